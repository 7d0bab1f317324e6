"""Quantization after training: smoothing, scales of inputs and rounding, layer after layer, from a few calibration batches.

Every layer is fitted to the inputs that it will have, which come from the quantized layers before it; each projection in it sees
those of the projections before it, and may compensate for what they have changed, see `models/post_training/compensation.py`.  A token counts as
much as the predictions depend on it, see `models/calibration/sensitivity.py`.

Legend: B samples, T tokens, S valid tokens, I inputs, O outputs, D hidden, G key/value groups, K head width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import DecoderLayer, decoder_layers
from models.calibration.observe import evaluating, hooked, input_of, layer_arguments, on_device
from models.calibration.sensitivity import readers_of, token_weights
from models.hardware.freed_memory import release_memory
from models.post_training.compensation import DenseHalf
from models.post_training.format_choice import formats_by_pattern, quantization_edits
from models.post_training.head import quantize_head
from models.post_training.settings import PostTrainingQuantization
from models.post_training.smoothing import Pair, best_factors, fold, pairs_of
from models.post_training.weight_solver import moment_of, round_weight
from models.quantization.cache import CacheFormat, cache_quantizers
from models.quantization.formats import format_of
from models.quantization.linear import FakeQuantizedLinear, quantized_linears
from models.quantization.quantizers import InputQuantizer, RowQuantizer
from models.quantization.scales import Search
from models.structure.edits import Edit, apply_edit

_DEFAULT = PostTrainingQuantization()
_SMOOTHING_BATCHES = 2  # that smoothing factors are searched on


@dataclass
class _Reading:
    """One batch on its way through the model.

    Attributes:
        mask_BT: Which tokens are valid.
        arguments: What the model gives to each of its layers beside the hidden states.
        weights: How much each token counts, (B, T), for every layer and every entry of `readers_of`.
        stream_BTD: The residual stream of the quantized model at the next layer.
        dense_BTD: That of the unquantized model; None where no format wants to know.
    """

    mask_BT: Tensor
    arguments: list[dict[str, Any]]
    weights: list[list[Tensor]]
    stream_BTD: Tensor
    dense_BTD: Tensor | None = None


def quantize_after_training(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    formats: str | Mapping[str, str],
    settings: PostTrainingQuantization = _DEFAULT,
    *,
    kv_cache: CacheFormat | None = None,
    on_layer: Callable[[int], object] = lambda index: None,
) -> list[Edit]:
    """Quantize the projections of every decoder layer, and its keys and values, in place; all quantizers are frozen afterwards.

    Args:
        model: Without quantizers.  Weights of norms and projections change; those of quantized projections lie on their grids.
        batches: Calibration batches (`input_ids`, `attention_mask`, `labels`).
        formats: A number format for all projections (see `models/quantization/formats.py`), or one for each of them by its name
            (see `models/post_training/format_choice.py`).
        settings: How to do it.
        kv_cache: Format of keys and values; None: they stay as they are.
        on_layer: Called with the number of each decoder layer when it is done.

    Returns:
        The edits that insert the same quantizers into a model of the same structure.

    Raises:
        ValueError: There was no batch, no such format, or a model that has quantizers already.
    """
    edits = quantization_edits(
        formats_by_pattern(model, formats, {}) if isinstance(formats, str) else formats, kv_cache
    )
    for edit in edits:
        apply_edit(model, edit)
    calibrate_quantizers(model, batches, settings, on_layer=on_layer)
    return edits


def calibrate_quantizers(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    settings: PostTrainingQuantization = _DEFAULT,
    *,
    on_layer: Callable[[int], object] = lambda index: None,
) -> None:
    """Find the scales of quantizers that are in a model but not frozen yet, and round its weights; see `quantize_after_training`."""
    formats = {linear.format for linear in quantized_linears(model).values()}
    smooths = any(settings.strengths(format) for format in formats)
    sensitive = bool(formats) and settings.sensitive and (settings.method != "nearest" or smooths)
    with evaluating(model), torch.no_grad():
        readings = [
            _read(model, batch, number, sensitive=sensitive)
            for number, batch in enumerate(on_device(batches, model.device))
        ]
        release_memory()  # of the gradients behind the tokens' weights
        if any(settings.compensates(format) for format in formats):
            for reading in readings:
                reading.dense_BTD = reading.stream_BTD
        for layer in decoder_layers(model):
            _quantize_layer(layer, readings, settings)
            on_layer(layer.index)
        if isinstance(model.get_output_embeddings(), FakeQuantizedLinear):
            quantize_head(model, batches, [reading.stream_BTD for reading in readings], settings)


def _read(model: PreTrainedModel, batch: Batch, number: int, *, sensitive: bool) -> _Reading:
    """What the first layer reads, the arguments of all layers, and the weights of the tokens."""
    mask_BT, blocks = batch["attention_mask"].bool(), [layer.block for layer in decoder_layers(model)]
    stream_BTD, arguments = layer_arguments(model, blocks, batch)
    weights = token_weights(model, batch, seed=number) if sensitive else [[mask_BT.float()] * 4 for _ in blocks]
    return _Reading(mask_BT, arguments, weights, stream_BTD)


def _quantize_layer(layer: DecoderLayer, readings: Sequence[_Reading], settings: PostTrainingQuantization) -> None:
    """Quantize one layer and move the streams behind it."""
    _smooth(layer, readings, settings)
    qkv, o_proj, gate_up, down_proj = readers_of(layer)
    halves = ((layer.attention, qkv, o_proj), (layer.mlp, gate_up, down_proj))
    for half, (module, readers, writer) in enumerate(halves):
        norm, finish = layer.stream_norms[half], layer.output_norms[half] if layer.output_norms else None
        arguments = [{} if half else reading.arguments[layer.index] for reading in readings]
        dense = [  # empty where no format compensates
            DenseHalf.run(module, writer[0], norm, finish, reading.dense_BTD, **named)
            for reading, named in zip(readings, arguments, strict=True)
            if reading.dense_BTD is not None
        ]
        inputs = [norm(reading.stream_BTD) for reading in readings]
        _quantize(readers, inputs, 2 * half, layer.index, readings, settings, [each.aim_of_reader for each in dense])
        _calibrate_cache(module, writer[0], inputs, arguments, readings, settings)
        inputs = [
            input_of(writer[0], module, input_BTD, **named) for input_BTD, named in zip(inputs, arguments, strict=True)
        ]
        aims = [partial(each.aim_of_writer, stream_BTD=r.stream_BTD) for each, r in zip(dense, readings, strict=False)]
        _quantize(writer, inputs, 2 * half + 1, layer.index, readings, settings, aims)
        for input_BTI, reading in zip(inputs, readings, strict=True):
            output_BTD = writer[0](input_BTI)
            reading.stream_BTD = reading.stream_BTD + (output_BTD if finish is None else finish(output_BTD))
        for each, reading in zip(dense, readings, strict=False):
            reading.dense_BTD = each.stream_BTD


def _quantize(
    linears: Sequence[Any],
    inputs: Sequence[Tensor],
    position: int,
    index: int,
    readings: Sequence[_Reading],
    settings: PostTrainingQuantization,
    aims: Sequence[Callable[[FakeQuantizedLinear], Tensor]],
) -> None:
    """Freeze the quantizers of layers that read the same tensor, and round their weights, which may aim at other outputs than theirs."""
    valid = [input_BTI[reading.mask_BT].float() for input_BTI, reading in zip(inputs, readings, strict=True)]
    roots = [reading.weights[index][position][reading.mask_BT].sqrt()[:, None] for reading in readings]
    grams: dict[str, Tensor] = {}  # of the inputs as each format rounds them
    for linear in linears:
        if not isinstance(linear, FakeQuantizedLinear):
            continue
        if linear.input_quantizer is not None:
            _freeze_input(linear.input_quantizer, valid, settings.input_search)
        compensates, product_IO = settings.compensates(linear.format), None
        if linear.format not in grams and (compensates or settings.method != "nearest"):
            grams[linear.format] = moment_of(linear, valid, roots)
        if compensates:
            outputs = [aim(linear)[reading.mask_BT].float() for aim, reading in zip(aims, readings, strict=True)]
            product_IO = moment_of(linear, valid, roots, outputs)
        round_weight(linear, grams.get(linear.format), product_IO, settings)


def _freeze_input(quantizer: InputQuantizer | RowQuantizer, inputs: Sequence[Tensor], search: Search) -> None:
    """Show a quantizer the inputs, if it wants to see any, and freeze it."""
    if isinstance(quantizer, InputQuantizer):
        quantizer.train()
        for input_SI in inputs:
            quantizer(input_SI)
        quantizer.eval()
    quantizer.freeze(search)


def _calibrate_cache(
    module: nn.Module,
    writer: nn.Module,
    inputs: Sequence[Tensor],
    arguments: Sequence[dict[str, Any]],
    readings: Sequence[_Reading],
    settings: PostTrainingQuantization,
) -> None:
    """Freeze the quantizers of keys and values of an attention that has some, after those that its inputs lead to."""
    for quantizer in cache_quantizers(module).values():
        seen: list[tuple[Tensor, ...]] = []
        with hooked([quantizer.register_forward_pre_hook(lambda _, both, seen=seen: seen.append(both))]):
            for input_BTD, named in zip(inputs, arguments, strict=True):
                input_of(writer, module, input_BTD, **named)
        for part, tensors in zip((quantizer.key, quantizer.value), zip(*seen, strict=True), strict=True):
            valid = [x_BGTK.transpose(1, 2)[r.mask_BT] for x_BGTK, r in zip(tensors, readings, strict=True)]
            _freeze_input(part, valid, settings.input_search)


def _smooth(layer: DecoderLayer, readings: Sequence[_Reading], settings: PostTrainingQuantization) -> None:
    """Fold the best smoothing factors into a layer that is not quantized yet; what it computes stays the same."""
    seen: dict[Any, list[Tensor]] = {}

    def note(linear: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(linear, []).append(inputs[0])

    pairs = {number: pair for number, pair in enumerate(pairs_of(layer)) if _strengths(pair, settings)}
    some = readings[:: -(-len(readings) // _SMOOTHING_BATCHES)]
    with hooked(pair.readers[0].register_forward_pre_hook(note) for pair in pairs.values()):
        for reading in some if pairs else ():
            layer.block(reading.stream_BTD, **reading.arguments[layer.index])
    for position, pair in pairs.items():
        inputs = zip(seen[pair.readers[0]], some, strict=True)
        input_SI = torch.cat([input_BTI[reading.mask_BT] for input_BTI, reading in inputs])
        weight_S = torch.cat([reading.weights[layer.index][position][reading.mask_BT] for reading in some])
        step = -(-len(input_SI) // settings.smoothing_tokens)
        formats = [format_of(r.format) if isinstance(r, FakeQuantizedLinear) else None for r in pair.readers]
        strengths = _strengths(pair, settings)
        fold(pair, best_factors(pair, input_SI[::step], formats, strengths=strengths, weight_S=weight_S[::step]))


def _strengths(pair: Pair, settings: PostTrainingQuantization) -> tuple[float, ...]:
    """Those to try: of the first reader that has any."""
    quantized = [reader for reader in pair.readers if isinstance(reader, FakeQuantizedLinear)]
    return next((found for reader in quantized if (found := settings.strengths(reader.format))), ())
