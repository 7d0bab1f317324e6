"""Smoothing: what is hard to round in one tensor moves, channel by channel, into another that takes it easily.

A linear layer reads x = X / s with weights W s: the output stays what it was, and s is chosen so that both are easier to round
(SmoothQuant, arXiv 2211.10438: outliers of inputs; AWQ, arXiv 2306.00978: weights that meet large inputs).  The division by s is
*folded*, exactly, into what makes X, so nothing is left to do at inference:

| X is made by                        | and read by      | s has                                     |
|-------------------------------------|------------------|-------------------------------------------|
| the norm before attention           | queries, keys, values | hidden channels                      |
| the rows of the value projection    | `o_proj`         | key/value channels, shared by their query heads |
| the norm before the MLP             | gate, up         | hidden channels                           |
| the rows of the up projection       | `down_proj`      | neurons                                   |

Legend: S tokens, I inputs of a layer, O its outputs, C channels that have their own s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.architecture import DecoderLayer, Part, gain_offset
from models.post_training.kernels import kernel_block, rounded_in_blocks
from models.post_training.rounding import nearest
from models.quantization.fake_quantize import fake_quantize
from models.quantization.formats import Format
from models.quantization.quantizers import row_scales
from models.quantization.scales import scale_from_amax

STRENGTHS = (0.15, 0.3, 0.5, 0.7, 0.9)
_MOST = 1e4  # factor; the least is one over it


@dataclass(frozen=True)
class Pair:
    """A tensor that its source (a norm, or outputs of a linear layer) can divide and its readers multiply.

    `channel_I` says which channel each input of a reader is.
    """

    source: Any
    readers: Sequence[Any]
    channel_I: Tensor

    @property
    def num_channels(self) -> int:
        """Channels that can have a factor of their own."""
        return int(self.channel_I.max()) + 1

    def largest(self, of_inputs_I: Tensor) -> Tensor:
        """From a figure (I,) of each input of the readers to the largest one of each channel, (C,)."""
        return of_inputs_I.new_zeros(self.num_channels).scatter_reduce(0, self.channel_I, of_inputs_I, "amax")


def pairs_of(layer: DecoderLayer) -> list[Pair]:
    """The pairs of a decoder layer, in the order in which data meets them; `Pair.readers[0]` tells them apart."""
    qkv = [getattr(layer.attention, name) for name in layer.family.qkv]
    gate_up = [getattr(layer.mlp, name) for name in layer.family.gate_up]
    device = layer.o_proj.weight.device
    hidden_D = torch.arange(layer.o_proj.weight.shape[0], device=device)
    neurons_M = torch.arange(layer.num_neurons, device=device)
    values_GC = torch.arange(layer.values.size, device=device).unflatten(0, (layer.num_kv_groups, -1))
    heads_I = values_GC.repeat_interleave(layer.num_query_heads // layer.num_kv_groups, dim=0).flatten()
    return [
        Pair(layer.stream_norms[0], qkv, hidden_D),
        Pair(layer.values, [layer.o_proj], heads_I),
        Pair(layer.stream_norms[1], gate_up, hidden_D),
        Pair(layer.up, [layer.down_proj], neurons_M),
    ]


@torch.no_grad()
def fold(pair: Pair, factor_C: Tensor) -> None:
    """Divide the source by factors and multiply the weights of the readers by them, in place."""
    if isinstance(pair.source, Part):
        rows = slice(pair.source.start, pair.source.start + pair.source.size)
        for parameter in (pair.source.linear.weight, pair.source.linear.bias):
            if parameter is not None:
                parameter[rows] /= factor_C if parameter.dim() == 1 else factor_C[:, None]
    else:
        offset, weight_C = gain_offset(pair.source), pair.source.weight
        weight_C.copy_((weight_C.float() + offset) / factor_C - offset)
    for reader in pair.readers:
        reader.weight *= factor_C[pair.channel_I]


def smoothing_factors(inputs_C: Tensor, weights_C: Tensor, strength: float) -> Tensor:
    """SmoothQuant's factors: inputs^strength / weights^(1 - strength), with a geometric mean of 1.

    Of the magnitudes of each channel of the inputs and of the weights that it meets (ones: AWQ's factors); a strength
    of 0 evens out the weights, 1 the inputs.  Factors are from 1e-4 to 1e4; 1 for channels that are always zero, or
    meet only zeros.
    """
    live_C = (inputs_C > 0) & (weights_C > 0)
    logarithm_C = strength * inputs_C.log() - (1 - strength) * weights_C.log()
    logarithm_C = torch.where(live_C, logarithm_C, 0.0)
    mean = logarithm_C.sum() / live_C.sum().clamp(min=1)
    return torch.where(live_C, (logarithm_C - mean).exp().clamp(1 / _MOST, _MOST), 1.0)


def best_factors(
    pair: Pair,
    input_SI: Tensor,
    formats: Sequence[Format | None],
    *,
    strengths: Sequence[float] = STRENGTHS,
    weight_S: Tensor | None = None,
) -> Tensor:
    """Factors, of SmoothQuant's and AWQ's for some strengths and none at all, with the least error of the readers' outputs.

    Formats are those of the readers, None for one that stays as it is; the search rounds weights to nearest.  Tokens of
    the sample count by `weight_S`, or all alike.
    """
    input_SI = input_SI.float()
    weight_S = input_SI.new_ones(len(input_SI)) if weight_S is None else weight_S
    weights = [reader.weight.float() for reader in pair.readers]
    typical_C = pair.largest(input_SI.square().mean(0).sqrt())
    largest_C = pair.largest(input_SI.abs().amax(0))
    weight_C = pair.largest(torch.cat(weights).abs().amax(0))
    trials = [torch.ones_like(typical_C)]
    for strength in strengths:
        trials.append(smoothing_factors(largest_C, weight_C, strength))
        if strength:
            trials.append(smoothing_factors(typical_C, torch.ones_like(weight_C), strength))
    errors = [_output_error(weights, input_SI, weight_S, factor_C[pair.channel_I], formats) for factor_C in trials]
    return trials[int(torch.stack(errors).argmin())]


def _output_error(
    weights: Sequence[Tensor], input_SI: Tensor, weight_S: Tensor, factor_I: Tensor, formats: Sequence[Format | None]
) -> Tensor:
    """The squared change of all outputs by rounding inputs and weights."""
    squares_S = torch.zeros_like(weight_S)
    for weight_OI, format in zip(weights, formats, strict=True):
        if format is not None:
            rounded_SI = _rounded_inputs(input_SI / factor_I, format)
            rounded_OI = nearest(weight_OI * factor_I, format.weight, search="max").weight_OI
            squares_S += (F.linear(rounded_SI, rounded_OI) - F.linear(input_SI, weight_OI)).square().sum(1)
    return (squares_S * weight_S).sum()


def _rounded_inputs(input_SI: Tensor, format: Format) -> Tensor:
    """Inputs as they will be multiplied; where weights alone are quantized, by the kernels that do most to them."""
    grid = format.input
    if grid is None:
        return rounded_in_blocks(input_SI, kernel_block(format.weight))
    scale = row_scales(input_SI, grid) if grid.scales == "row" else scale_from_amax(input_SI.abs().amax(), grid.high)
    return fake_quantize(input_SI, scale, None, grid.numbers)
