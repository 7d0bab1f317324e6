"""Weights and optimizer states in few bits: rounding that loses no update, and checkpoints that load.

torchao provides the optimizers (`torchao.optim`, named in a recipe like any other) and the 8-bit weights of a frozen model; it is
an optional dependency (extra `torchao`) and imported only where it is used.
"""

from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer


def check_rounding(optimizer: Optimizer) -> None:
    """Raise `ValueError` for bfloat16 weights in an optimizer of torch, which rounds to nearest.

    bfloat16 has 8 significant bits: an update below 1/512 of a weight is then lost at every step, and training stalls without
    any error.  Stochastic rounding keeps it in expectation (arXiv 2010.06192).
    """
    low = any(p.dtype == torch.bfloat16 for group in optimizer.param_groups for p in group["params"])
    if low and type(optimizer).__module__.startswith("torch.optim"):
        raise ValueError(
            f"expected an optimizer that rounds stochastically for bfloat16 weights, found {type(optimizer).__name__}; use "
            "torchao.optim.AdamW8bit with bf16_stochastic_round, or set model.student_dtype to float32"
        )


def quantize_weights(model: nn.Module) -> None:
    """Replace the weights of all linear layers of a frozen model by 8-bit ones, one scale per output, in place.

    Inputs stay in floating point; each product converts its weight.  Mean KL to the same teacher in float32, measured on
    answers of SmolLM2-135M-Instruct: see docs/howto-memory.md.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package torchao for weights in 8 bits, found none; install it with `pip install -e '.[torchao]'`"
        ) from error
    quantize_(model, Int8WeightOnlyConfig())


def admit_optimizer_states(path: Path) -> None:
    """Make a checkpoint loadable with `weights_only=True` that holds torchao's optimizer states.

    torchao declares its states safe when it is imported.

    Raises:
        ModuleNotFoundError: The checkpoint holds such states, and torchao is not installed.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, EOFError, ValueError):
        return  # no checkpoint of torch: who loads it says so
    if not any(name.startswith("torchao.optim.") for name in names):
        return
    try:
        import torchao.optim  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected the package torchao for the optimizer states in {str(path)!r}, found none; install it with "
            "`pip install -e '.[torchao]'`"
        ) from error
