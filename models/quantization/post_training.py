"""Quantization after training: smoothing, scales of inputs and rounding, layer after layer, from a few calibration batches.

Every layer is fitted to the inputs that it will have, which come from the quantized layers before it; each projection in it sees
those of the projections before it.  A token counts as much as the predictions depend on it, see `models/quantization/sensitivity.py`.

Legend: B samples, T tokens, S valid tokens, I inputs, O outputs, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.architecture import DecoderLayer, decoder_layers
from models.forward import Batch
from models.pruning.least_squares import moment
from models.pruning.observe import evaluating, hooked, on_device
from models.quantization.formats import format_of
from models.quantization.linear import FakeQuantizedLinear
from models.quantization.quantizers import FakeQuantizer, InputQuantizer
from models.quantization.rounding import Rounded, gptq, nearest, quantease
from models.quantization.scales import Search
from models.quantization.sensitivity import readers_of, token_weights
from models.quantization.smoothing import STRENGTHS, best_factors, fold, pairs_of
from models.structure import Edit, apply_edit, quantize_decoder

Method = Literal["nearest", "gptq", "quantease"]
_SMOOTHING_BATCHES = 2  # that smoothing factors are searched on


@dataclass(frozen=True)
class PostTrainingQuantization:
    """How a model is quantized after training.

    Attributes:
        format: Name of a number format, see `models/quantization/formats.py`.
        method: How weights are rounded: `nearest`, `gptq`, or `quantease`, which starts from `gptq` and takes three times as long;
            see `models/quantization/rounding.py`.
        weight_search: How scales of weights are chosen: `max` or `mse`.
        input_search: How calibrated scales of inputs are chosen: `max`, `percentile` or `mse`.
        smoothing: Strengths that the search for smoothing factors tries; empty: no smoothing; None: `STRENGTHS` where it was
            found to help, which is where inputs are rounded to integers, and where weights alone are rounded to nearest.
        sensitive: Tokens count by what the predictions owe to them, which takes a backward pass; otherwise all alike.
        damping: Share of the mean diagonal of a Gram matrix that is added to it.
        sweeps: Passes of `quantease`, at most.
        smoothing_tokens: Calibration tokens on which smoothing factors are tried, at most.
    """

    format: str = "fp8_e4m3"
    method: Method = "quantease"
    weight_search: Search = "mse"
    input_search: Search = "mse"
    smoothing: tuple[float, ...] | None = None
    sensitive: bool = True
    damping: float = 0.01
    sweeps: int = 4
    smoothing_tokens: int = 512

    def strengths(self) -> tuple[float, ...]:
        """The strengths that the search for smoothing factors tries."""
        if self.smoothing is not None:
            return self.smoothing
        inputs = format_of(self.format).input
        helps = self.method == "nearest" if inputs is None else inputs.numbers != "fp8_e4m3"
        return STRENGTHS if helps else ()


@dataclass
class _Reading:
    """One batch on its way through the model.

    Attributes:
        mask_BT: Which tokens are valid.
        arguments: What the model gives to each of its layers beside the hidden states.
        weights: How much each token counts, (B, T), for every layer and every entry of `readers_of`.
        stream_BTD: The residual stream of the quantized model at the next layer.
    """

    mask_BT: Tensor
    arguments: list[dict[str, Any]]
    weights: list[list[Tensor]]
    stream_BTD: Tensor


def quantize_after_training(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    settings: PostTrainingQuantization,
    *,
    on_layer: Callable[[int], None] = lambda index: None,
) -> Edit:
    """Quantize every projection of every decoder layer, in place; all quantizers are frozen afterwards.

    Args:
        model: Without quantizers.  Weights of norms and projections change; the weights of projections lie on their grids.
        batches: Calibration batches (`input_ids`, `attention_mask`, `labels`).
        settings: What to do.
        on_layer: Called with the number of each decoder layer when it is done.

    Returns:
        The edit that inserts the same quantizers into a model of the same structure.

    Raises:
        ValueError: There was no batch, no such format, groups that do not divide the inputs of a projection, or a model that has
            quantizers already.
    """
    edit = quantize_decoder(model, settings.format)
    with evaluating(model), torch.no_grad():
        readings = [
            _read(model, batch, settings, number) for number, batch in enumerate(on_device(batches, model.device))
        ]
        apply_edit(model, edit)
        for layer in decoder_layers(model):
            _quantize_layer(layer, readings, settings)
            on_layer(layer.index)
    return edit


def _read(model: PreTrainedModel, batch: Batch, settings: PostTrainingQuantization, number: int) -> _Reading:
    """What the first layer reads, the arguments of all layers, and the weights of the tokens."""
    streams: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def note(_: Any, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        if not streams:
            streams.append(positional[0].detach())
        arguments.append(named)

    mask_BT, blocks = batch["attention_mask"].bool(), [layer.block for layer in decoder_layers(model)]
    with hooked(block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks):
        if settings.sensitive and (settings.method != "nearest" or settings.strengths()):
            weights = token_weights(model, batch, seed=number)
        else:
            weights = [[mask_BT.float()] * 4 for _ in blocks]
            model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return _Reading(mask_BT, arguments, weights, streams[0])


def _quantize_layer(layer: DecoderLayer, readings: Sequence[_Reading], settings: PostTrainingQuantization) -> None:
    """Quantize one layer and move the streams behind it."""
    if settings.strengths():
        _smooth(layer, readings, settings)
    qkv, o_proj, gate_up, down_proj = readers_of(layer)
    halves = ((layer.attention, qkv, o_proj), (layer.mlp, gate_up, down_proj))
    for half, (module, readers, writer) in enumerate(halves):
        norm, finish = layer.stream_norms[half], layer.output_norms[half] if layer.output_norms else None
        inputs = [norm(reading.stream_BTD) for reading in readings]
        _quantize(readers, inputs, 2 * half, layer.index, readings, settings)
        inputs = [
            _input_of(writer[0], module, input_BTD, reading.arguments[layer.index] if half == 0 else {})
            for input_BTD, reading in zip(inputs, readings, strict=True)
        ]
        _quantize(writer, inputs, 2 * half + 1, layer.index, readings, settings)
        for input_BTI, reading in zip(inputs, readings, strict=True):
            output_BTD = writer[0](input_BTI)
            reading.stream_BTD = reading.stream_BTD + (output_BTD if finish is None else finish(output_BTD))


def _quantize(
    linears: Sequence[Any],
    inputs: Sequence[Tensor],
    position: int,
    index: int,
    readings: Sequence[_Reading],
    settings: PostTrainingQuantization,
) -> None:
    """Freeze the quantizers of layers that read the same tensor, and round their weights."""
    valid = [input_BTI[reading.mask_BT].float() for input_BTI, reading in zip(inputs, readings, strict=True)]
    for linear in linears:
        if linear.input_quantizer is not None:
            _freeze_input(linear.input_quantizer, valid, settings.input_search)
    gram_II = torch.zeros(2 * inputs[0].shape[-1:], dtype=torch.float64, device=inputs[0].device)
    if settings.method != "nearest":
        for input_SI, reading in zip(valid, readings, strict=True):
            rounded_SI = input_SI if linears[0].input_quantizer is None else linears[0].input_quantizer(input_SI)
            root_S1 = reading.weights[index][position][reading.mask_BT].sqrt()[:, None]
            gram_II += moment(rounded_SI * root_S1, rounded_SI * root_S1)
    for linear in linears:
        rounded = _rounded(linear, gram_II, settings)
        linear.weight.copy_(rounded.weight_OI)
        linear.weight_quantizer.set_scales(rounded.scale, rounded.zero_point)


def _rounded(linear: FakeQuantizedLinear, gram_II: Tensor, settings: PostTrainingQuantization) -> Rounded:
    weight_OI, grid, search = linear.weight, linear.weight_quantizer.grid, settings.weight_search
    if settings.method == "nearest":
        return nearest(weight_OI, grid, search=search)
    start = gptq(weight_OI, gram_II, grid, search=search, damping=settings.damping, ordered=True)
    if settings.method == "gptq":
        return start
    return quantease(weight_OI, gram_II, grid, start, damping=settings.damping, sweeps=settings.sweeps)


def _freeze_input(quantizer: FakeQuantizer, inputs: Sequence[Tensor], search: Search) -> None:
    """Show a quantizer the inputs, if it wants to see any, and freeze it."""
    if isinstance(quantizer, InputQuantizer):
        quantizer.train()
        for input_SI in inputs:
            quantizer(input_SI)
        quantizer.eval()
    quantizer.freeze(search)  # type: ignore[operator]  # those of inputs all have it


def _smooth(layer: DecoderLayer, readings: Sequence[_Reading], settings: PostTrainingQuantization) -> None:
    """Fold the best smoothing factors into a layer that is not quantized yet; what it computes stays the same."""
    seen: dict[Any, list[Tensor]] = {}

    def note(linear: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(linear, []).append(inputs[0])

    pairs, some = pairs_of(layer), readings[:: -(-len(readings) // _SMOOTHING_BATCHES)]
    with hooked(pair.readers[0].register_forward_pre_hook(note) for pair in pairs):
        for reading in some:
            layer.block(reading.stream_BTD, **reading.arguments[layer.index])
    for position, pair in enumerate(pairs):
        inputs = zip(seen[pair.readers[0]], some, strict=True)
        input_SI = torch.cat([input_BTI[reading.mask_BT] for input_BTI, reading in inputs])
        weight_S = torch.cat([reading.weights[layer.index][position][reading.mask_BT] for reading in some])
        step = -(-len(input_SI) // settings.smoothing_tokens)
        factor_C = best_factors(
            pair,
            input_SI[::step],
            format_of(settings.format),
            strengths=settings.strengths(),
            weight_S=weight_S[::step],
        )
        fold(pair, factor_C)


class _Reached(Exception):  # noqa: N818  (no error: it ends a forward pass)
    """A forward pass has come to where it was wanted."""

    def __init__(self, input_BTI: Tensor) -> None:
        self.input_BTI = input_BTI


def _input_of(linear: Any, module: Any, hidden_BTD: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What a linear layer would be given if its attention or MLP ran; nothing after it is computed."""

    def stop(_: Any, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    with hooked([linear.register_forward_pre_hook(stop)]):
        try:
            module(hidden_states=hidden_BTD, **arguments) if arguments else module(hidden_BTD)
        except _Reached as reached:
            return reached.input_BTI
    raise AssertionError("the module does not call the layer")
