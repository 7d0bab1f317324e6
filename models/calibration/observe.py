"""Looking into a model while it reads calibration batches, and leaving it as it was: no hook, no mode, no gradient stays behind.

Legend: B samples, T tokens, I inputs, O outputs of a module, D hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from datamodules.collate import Batch

# Takes the module's input (B, T, I), its output (B, T, O) and the mask (B, T).
Observer = Callable[[Tensor, Tensor, Tensor], None]


@torch.no_grad()
def observe(model: PreTrainedModel, batches: Iterable[Batch], observers: Iterable[tuple[nn.Module, Observer]]) -> None:
    """Run a model up to its final hidden states, in evaluation mode, and show each observer what passes its module.

    Of a batch `input_ids` and `attention_mask` are used; a module may have several observers.

    Raises:
        ValueError: There was no batch.
    """
    mask_BT = torch.empty(0)

    def hook(observer: Observer) -> Callable[..., None]:
        return lambda _, inputs, output: observer(inputs[0], output, mask_BT)

    with evaluating(model), hooked(module.register_forward_hook(hook(observer)) for module, observer in observers):
        for batch in on_device(batches, model.device):
            mask_BT = batch["attention_mask"]
            model.base_model(input_ids=batch["input_ids"], attention_mask=mask_BT, use_cache=False)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The tensors of each batch on a device.

    Raises:
        ValueError: There was no batch; raised when the iteration ends.
    """
    seen = 0
    for batch in batches:
        yield {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        seen += 1
    if not seen:
        raise ValueError("expected at least one calibration batch, found none; raise calibration_batches to 1 or more")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Registered hooks for a while."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


def layer_arguments(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batch: Batch
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The residual stream (B, T, D) at the first decoder layer, and what the model gives to each beside hidden states."""
    streams: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def note(_: Any, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        if not streams:
            streams.append(positional[0].detach())
        arguments.append(named)

    with hooked(block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks):
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return streams[0], arguments


class _Reached(Exception):  # noqa: N818  (no error: it ends a forward pass)
    """A forward pass has come to where it was wanted."""

    def __init__(self, input_BTI: Tensor) -> None:
        self.input_BTI = input_BTI


def input_of(linear: Any, module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What a linear layer (B, T, I) would be given if its module ran on these arguments; nothing after it is computed."""

    def stop(_: Any, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    with hooked([linear.register_forward_pre_hook(stop)]):
        try:
            module(*args, **kwargs)
        except _Reached as reached:
            return reached.input_BTI
    raise AssertionError("the module does not call the layer")
