"""Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT: inserted as an edit, merged wherever the student leaves training.

Only the adapters are trained, so gradients and optimizer state exist for them alone.  Nothing outside of training sees them:
copies that generate and everything that is exported hold ordinary linear layers with `W + alpha / rank * B A`.

PEFT is imported only where adapters exist, as it is an optional dependency (extra `lora`).
"""

import copy
from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from models.architecture import decoder_layers

Projection = Literal[
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"
]


def projections(model: PreTrainedModel) -> list[str]:
    """The names of all projections of a decoder layer of this model."""
    return [name for _, name in decoder_layers(model)[0].linears()]


def check_peft() -> None:
    """Raise `ModuleNotFoundError` with the remedy if PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package peft for LoRA, found none; install it with `pip install -e '.[lora]'`"
        ) from error


def has_adapters(model: nn.Module) -> bool:
    """Whether a model holds adapters that are not merged."""
    return hasattr(model, "peft_config")


def insert_adapters(
    model: PreTrainedModel,
    optimizers: Sequence[Optimizer] = (),
    *,
    rank: int,
    alpha: float,
    dropout: float,
    modules: Sequence[str],
) -> None:
    """Put an adapter beside linear layers of every decoder layer, in place, and freeze everything else.

    The adapters of these `modules` (names in the layer) are float32: A has `rank` rows, their scale is `alpha / rank`,
    and `dropout` is the probability with which an input of A is dropped in training.  Optimizers are not looked at:
    what is frozen stays in its group.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
        ValueError: There are adapters already, a module is no projection of a decoder layer, or it is quantized.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    if has_adapters(model):
        raise ValueError("expected a student without LoRA adapters, found one that has them; insert them once")
    unknown = sorted(set(modules) - set(projections(model)))
    if unknown or not modules:
        raise ValueError(
            f"expected LoRA modules among {', '.join(projections(model))}, found {', '.join(unknown) or 'none'}; change them "
            "in the recipe"
        )
    for layer in decoder_layers(model):
        for owner, name in layer.linears():
            if name in modules and not isinstance(getattr(owner, name), nn.Linear):
                raise ValueError(
                    f"expected linear layers for LoRA, found {name} of layer {layer.index} as a "
                    f"{type(getattr(owner, name)).__name__}; use LoRA on a student without quantizers"
                )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(modules))  # type: ignore[arg-type]
    training = model.training
    inject_adapter_in_model(config, model)
    model.train(training)


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Fold all adapters into the weights they adapt, in place, through PEFT's own merge; returns the model."""
    if not has_adapters(model):
        return model
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, layer.get_base_layer())
    del model.peft_config
    return model


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model without adapters: itself if it has none, else a merged copy."""
    return merge_adapters(copy.deepcopy(model)) if has_adapters(model) else model
