"""Chooses a format for each layer: by patterns of names, or by measured sensitivity under a budget of bits.

The cost of a format in a layer is what its rounded weight changes in the predictions, to second order: with the error e_t = dW x_t of
the outputs at token t and the gradient g_t there, on average 1/2 |g_t|^2 |e_t|^2 / O nats (O outputs; gradients and errors are
taken for unrelated).  Summed over tokens that is 1/2 tr(dW G dW^T) / O, with a Gram matrix G of inputs weighed by |g_t|^2.

Legend: B samples, T tokens, S valid tokens, I inputs, O outputs.
"""

import heapq
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import decoder_layers, head_name
from models.calibration.least_squares import moment
from models.calibration.observe import evaluating, hooked, on_device
from models.calibration.sensitivity import readers_of, token_weights
from models.forward import answer_lengths
from models.quantization.cache import CacheFormat
from models.quantization.fake_quantize import fake_quantize
from models.quantization.formats import format_of
from models.quantization.output_head import check_head_format
from models.quantization.scales import weight_scales
from models.structure.edits import Edit, quantize_decoder

UNQUANTIZED = "none"
_UNQUANTIZED_BITS = 16.0


def formats_by_pattern(model: PreTrainedModel, format: str, exceptions: Mapping[str, str]) -> dict[str, str]:
    """The format of every projection of every decoder layer, and of the output head where it is named.

    Exceptions are formats by patterns of qualified names, such as `*.down_proj` or `model.layers.0.*`; `none` leaves a
    layer as it is, and the last pattern that fits decides.  The output head (`lm_head`) is meant by its very name only.

    Raises:
        ValueError: No such format, a pattern that fits no projection, or a head whose inputs would be rounded.
    """
    names, head = quantize_decoder(model, format)["modules"], head_name(model)
    chosen = dict.fromkeys(names, format)
    for pattern, other in exceptions.items():
        fitting = [head] if pattern == head else [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(
                f"expected a pattern of projections such as *.down_proj, or {head}, found {pattern!r}, which fits none of {len(names)} such as "
                f"{names[0]}; correct the pattern"
            )
        if other != UNQUANTIZED:
            check_head_format(other) if pattern == head else format_of(other)
        chosen |= dict.fromkeys(fitting, other)
    return chosen


def quantization_edits(formats: Mapping[str, str], kv_cache: CacheFormat | None = None) -> list[Edit]:
    """One edit for each format of `formats_by_pattern` or `formats_by_sensitivity`, and one for keys and values."""
    edits: dict[str, Edit] = {}
    for name, format in formats.items():
        if format != UNQUANTIZED:
            edits.setdefault(format, {"op": "fake_quantize", "format": format, "modules": []})["modules"].append(name)
    return [*edits.values(), *([] if kv_cache is None else [{"op": "quantize_cache", "format": kv_cache}])]


def formats_by_sensitivity(
    model: PreTrainedModel, batches: Sequence[Batch], candidates: Sequence[str], average_bits: float
) -> dict[str, str]:
    """The formats that cost least in all, with a given number of bits a weight on average.

    Every layer starts with the fewest bits; whatever saves most for its bits is raised next.  As in `models/pruning/budget/allocation.py`,
    only formats on the lower convex hull of a layer's costs take part.

    Batches are a few, with `labels`.  Candidates are weight-only formats; `none` counts 16 bits.  The average is over
    all weights of the projections, scales and zero points included.  The model has no quantizers, and is not changed.

    Raises:
        ValueError: A format that rounds inputs, or a budget below the smallest candidate.
    """
    rounding = next((name for name in candidates if name != UNQUANTIZED and format_of(name).input is not None), None)
    if rounding is not None:
        raise ValueError(
            f"expected weight-only formats for a budget of bits, found {rounding}; choose among int8_weight_only, int8_g*, int4_g* "
            "and none"
        )
    bits = {name: bits_of(name) for name in candidates}
    ordered = sorted(candidates, key=lambda name: bits[name])
    if average_bits < bits[ordered[0]]:
        raise ValueError(
            f"expected an average of at least {bits[ordered[0]]:g} bits, what {ordered[0]} needs, found {average_bits:g}; raise it, or "
            "add a smaller format"
        )
    costs = format_costs(model, batches, ordered)
    sizes = {name: linear.weight.numel() for name, linear in model.named_modules() if name in costs}
    hulls = {name: _hull([(bits[f], cost[f], f) for f in ordered]) for name, cost in costs.items()}
    chosen = {name: hull[0][2] for name, hull in hulls.items()}
    steps = heapq.merge(
        *(
            [(-(a[1] - b[1]) / (b[0] - a[0]) / sizes[name], name, b) for a, b in pairwise(hull)]
            for name, hull in hulls.items()
        )
    )
    left = average_bits * sum(sizes.values()) - sum(sizes[name] * bits[format] for name, format in chosen.items())
    for _, name, (more, _, format) in steps:
        extra = sizes[name] * (more - bits[chosen[name]])
        if extra > left:
            break
        chosen[name], left = format, left - extra
    return chosen


@torch.no_grad()
def format_costs(
    model: PreTrainedModel, batches: Sequence[Batch], formats: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For every projection, what each weight-only format would cost, in nats per answer token."""
    groups = [group for layer in decoder_layers(model) for group in readers_of(layer)]
    grams, answer_tokens = _weighted_grams(model, batches, groups)
    names = {module: name for name, module in model.named_modules()}
    costs: dict[str, dict[str, float]] = {}
    for group, gram_II in zip(groups, grams, strict=True):
        outputs = sum(len(linear.weight) for linear in group)  # type: ignore[misc, arg-type]  # of linear layers
        for linear in group:
            weight_OI: Any = linear.weight
            costs[names[linear]] = {
                format: _error(weight_OI, gram_II, format) / (2 * outputs * answer_tokens) for format in formats
            }
    return costs


def _error(weight_OI: Tensor, gram_II: Tensor, format: str) -> float:
    """tr(dW G dW^T) of round-to-nearest."""
    if format == UNQUANTIZED:
        return 0.0
    grid = format_of(format).weight
    scale, zero_point = weight_scales(weight_OI, grid)
    error_OI = fake_quantize(weight_OI, scale, zero_point, grid.numbers, 0, grid.group_size) - weight_OI
    return float(((error_OI @ gram_II) * error_OI).sum())


def _weighted_grams(
    model: PreTrainedModel, batches: Sequence[Batch], groups: Sequence[Sequence[Any]]
) -> tuple[list[Tensor], int]:
    grams = [torch.zeros(2 * group[0].weight.shape[1:]).to(model.device) for group in groups]
    answer_tokens = 0
    for number, batch in enumerate(on_device(batches, model.device)):
        weights = [weight_BT for layer in token_weights(model, batch, seed=number) for weight_BT in layer]
        inputs: dict[nn.Module, Tensor] = {}

        def note(linear: nn.Module, arguments: tuple[Tensor, ...], inputs: dict[nn.Module, Tensor] = inputs) -> None:
            inputs[linear] = arguments[0]

        with evaluating(model), hooked(group[0].register_forward_pre_hook(note) for group in groups):
            model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for group, gram_II, weight_BT in zip(groups, grams, weights, strict=True):
            weighted_SI = (inputs[group[0]].float() * weight_BT.sqrt()[..., None]).flatten(0, 1)
            gram_II += moment(weighted_SI, weighted_SI)
        answer_tokens += sum(answer_lengths(batch))
    return grams, answer_tokens


def bits_of(format: str) -> float:
    """Stored bits of a weight with its share of the scales; 16 where it stays as it is."""
    return _UNQUANTIZED_BITS if format == UNQUANTIZED else format_of(format).weight.bits()


def _hull(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The corners (bits, cost, format) of the lower convex hull, ascending in bits and descending in cost."""
    corners: list[tuple[float, float, str]] = []
    for point in points:
        while len(corners) > 1 and _slope(corners[-2], point) <= _slope(corners[-2], corners[-1]):
            corners.pop()
        if not corners or point[1] < corners[-1][1]:
            corners.append(point)
    return corners


def _slope(start: tuple[float, float, str], end: tuple[float, float, str]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
