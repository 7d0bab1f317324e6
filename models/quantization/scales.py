"""Scales from observed values: the largest magnitude, a percentile, or the least squared error.

Scales are float16 numbers held in float32, so that float32 and float16 graphs and engines hold the very same ones.

Legend: O outputs, I inputs, G groups of inputs, S values that share a scale, C candidates, H histogram bins.
"""

from typing import Literal

import torch
from torch import Tensor

from models.quantization.fake_quantize import fake_quantize, in_blocks
from models.quantization.formats import Grid

Search = Literal["max", "percentile", "mse"]
_SHIFT = 17  # bits of a float32 below those that name a bin
NUM_BINS = 2 ** (31 - _SHIFT)  # of `histogram_of`: 8 bits of exponent and 6 of mantissa, three more than FP8 has
PERCENTILE = 0.9999
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16
_WEIGHT_SHARES = torch.linspace(1, 0.4, 13).tolist()  # of the largest magnitude, in a search
_INPUT_SHARES = torch.linspace(1, 0.05, 96).tolist()
_FP8_INPUT_SHARES = torch.linspace(
    2, 0.05, 196
).tolist()  # above 1: floats lose nothing there, and values meet other codes


def scale_from_amax(amax: Tensor, high: float = 448.0) -> Tensor:
    """The scale that maps `amax` (largest magnitudes, any shape) onto the code `high`, in float32.

    It is rounded *up* to a float16 number, so that no value in range is clipped by the rounding.
    """
    scale = (amax.float() / high).clamp(min=SMALLEST_SCALE)
    half = scale.half()
    rounded_down = half.float() < scale
    up = torch.nextafter(half, torch.full_like(half, torch.inf))
    return torch.where(rounded_down, up, half).float()


def weight_scales(
    weight_OI: Tensor, grid: Grid, search: Search = "max", importance_I: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of a weight, shaped for `fake_quantize`.

    Args:
        weight_OI: The weight; the last group of a row may be shorter.
        grid: Its grid.
        search: `max` clips nothing; `mse` tries ranges down to 0.4 of that and takes the one with the least squared error of each
            scale; `percentile` is for inputs and is taken as `max`.
        importance_I: How much a squared error counts at each input, for `mse`; None: all the same.

    Returns:
        Float32 scales: a scalar, (O,) or (O, G); codes of the zero points (int8) of the same shape, or None.
    """
    values = _sharing(weight_OI.detach().float(), grid)  # (..., S)
    rows, low, high = values.reshape(-1, values.shape[-1]), values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    counts = 1.0 if importance_I is None else _sharing(importance_I.expand_as(weight_OI), grid).reshape(rows.shape)
    best = torch.full_like(low, torch.inf)
    scale, zero_point = torch.ones_like(low), torch.zeros_like(low)
    for share in _WEIGHT_SHARES if search == "mse" else [1.0]:
        if grid.zero_point:
            trial = scale_from_amax(share * (high - low), grid.high - grid.low)
            trial_zero = (grid.low - share * low / trial).round().clamp(grid.low, grid.high)
        else:
            trial = scale_from_amax(share * torch.maximum(high, -low), grid.high)
            trial_zero = torch.zeros_like(trial)
        zero_points = trial_zero.flatten() if grid.zero_point else None
        error = (
            fake_quantize(rows, trial.flatten(), zero_points, grid.numbers).sub_(rows).square_().mul_(counts).sum(-1)
        )
        error = error.view_as(best)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero_point = torch.where(better, trial, scale), torch.where(better, trial_zero, zero_point)
    return scale, zero_point.to(torch.int8) if grid.zero_point else None


def histogram_of(x: Tensor) -> Tensor:
    """How often each magnitude occurs: (H,) counts over bins that are 64 to an octave, over all float32 numbers.

    FP8 has eight steps to an octave: with bins as wide, a search would see all values of a bin on the grid or off it together.
    """
    bins = x.detach().abs().float().view(torch.int32).flatten() >> _SHIFT
    return torch.bincount(bins, minlength=NUM_BINS)


def amax_from_histogram(counts_H: Tensor, amax: Tensor, grid: Grid, search: Search) -> Tensor:
    """The magnitude that is mapped onto the largest code.

    Args:
        counts_H: What `histogram_of` counted.
        amax: The largest magnitude, scalar.
        grid: The grid of the tensor.
        search: `max`: amax itself; `percentile`: 99.99 % of the values are not clipped; `mse`: the least squared error of all
            values, each taken for the middle of its bin.
    """
    if search == "max":
        return amax
    middles_H = _bin_middles(counts_H.device).clamp(max=amax)
    if search == "percentile":
        reached = counts_H.cumsum(0) >= PERCENTILE * counts_H.sum()
        return middles_H[reached.nonzero()[0, 0]].clamp(min=torch.finfo(torch.float32).tiny)
    counted_H = counts_H > 0
    values, weights = middles_H[counted_H], counts_H[counted_H].double()
    shares = _FP8_INPUT_SHARES if grid.numbers == "fp8_e4m3" else _INPUT_SHARES
    trials_C = amax * torch.tensor(shares, device=amax.device)
    errors_C = [
        (
            weights * (fake_quantize(values, scale_from_amax(trial, grid.high), None, grid.numbers) - values).square()
        ).sum()
        for trial in trials_C
    ]
    return trials_C[torch.stack(errors_C).argmin()]


def _bin_middles(device: torch.device) -> Tensor:
    edges = torch.arange(NUM_BINS, dtype=torch.int32, device=device) << _SHIFT
    middles = (edges + (1 << (_SHIFT - 1))).view(torch.float32)
    return middles.nan_to_num(nan=torch.finfo(torch.float32).max, posinf=torch.finfo(torch.float32).max)


def _sharing(weight_OI: Tensor, grid: Grid) -> Tensor:
    """A view whose last dimension holds the values that share a scale; the others have the shape of the scales."""
    if grid.scales == "tensor":
        return weight_OI.flatten()
    return weight_OI if grid.scales == "row" else in_blocks(weight_OI, grid.group_size)
