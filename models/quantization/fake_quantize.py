"""Fake quantization: one operator for training, ONNX export and the engine.

    fake_quantize(x, scale) = (code - zero point) * scale,   code = clamp(round(x / scale) + zero point, low, high)

The arguments are those of ONNX's QuantizeLinear: a scale for all of x, for each slice along an axis, or for each block of
neighbours along the last axis.  The division is done in float32 whatever the dtype of x, and ties go to the even code.  The function is a custom
operator, so `torch.export` keeps it whole and `export/onnx_graph/trace.py` writes it as QuantizeLinear / DequantizeLinear, which compute the
same bits.

FP8 E4M3 ("fn": finite, with NaN, without infinities; FP8 Formats for Deep Learning, arXiv 2209.05433) has a maximum of 448, a
smallest normal of 2**-6 and a smallest subnormal of 2**-9.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.quantization.formats import RANGES

_SMALLEST_NORMAL = 2.0**-6
_EXPONENT_BITS = 0x7F800000  # of a float32


@torch.library.custom_op("potstill::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    numbers: str = "fp8_e4m3",
    axis: int = 0,
    block_size: int = 0,
) -> Tensor:
    """Round x to the grid of `scale`; straight-through gradient.

    Args:
        x: Any shape and floating dtype.
        scale: Float32 dequantization multipliers: a scalar; of one dimension, one number for each index of `axis`; or with
            `block_size` x's shape with the last dimension divided by it, rounded up.  They receive no gradient.
        zero_point: Codes of the shape of `scale`; None: 0.
        numbers: What the codes are, see `models/quantization/formats.py`.
        axis: Dimension of a one-dimensional scale.
        block_size: Neighbours in the last dimension that share a scale (the last block may be shorter); 0: see `axis`.

    Returns:
        A tensor like x whose values lie on the grid.
    """
    grid, scale, zero_point = on_grid(x, scale, zero_point, numbers, axis, block_size)
    if zero_point is not None:
        grid.sub_(zero_point)
    return in_shape_of(x, grid.mul_(scale).to(x.dtype))


def codes_of(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, numbers: str, axis: int = 0, block_size: int = 0
) -> Tensor:
    """The codes behind `fake_quantize`, in the shape of x: float8_e4m3fn, or int8 (for INT4 too)."""
    grid, _, _ = on_grid(x, scale, zero_point, numbers, axis, block_size)
    return in_shape_of(x, grid.to(torch.float8_e4m3fn if numbers == "fp8_e4m3" else torch.int8))


def on_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, numbers: str, axis: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes as float32, with scales and zero points that broadcast against them; blocks in a dimension of their own."""
    if block_size:
        x, scale = in_blocks(x, block_size), scale.unsqueeze(-1)
        zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
    elif scale.dim():
        shape = [-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())]
        scale, zero_point = scale.view(shape), None if zero_point is None else zero_point.view(shape)
    low, high = RANGES[numbers]
    codes = x.float() / scale
    if numbers == "fp8_e4m3":
        return _round_to_fp8(codes.clamp_(low, high)), scale, zero_point
    codes.round_()
    if zero_point is not None:
        codes.add_(zero_point)
    return codes.clamp_(low, high), scale, zero_point


def in_blocks(x: Tensor, block_size: int) -> Tensor:
    """The last dimension divided into blocks, (..., blocks, block_size); zeros fill up the last block."""
    return F.pad(x, (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size))


def in_shape_of(x: Tensor, blocks: Tensor) -> Tensor:
    """Values in the shape of x, which may be divided `in_blocks`."""
    if blocks.dim() == x.dim():
        return blocks
    return blocks.flatten(-2)[..., : x.shape[-1]].contiguous()


def _round_to_fp8(x: Tensor) -> Tensor:
    """Rounding by arithmetic, in place: the bits of a cast to float8_e4m3fn and back, two to three times as fast on a CPU.

    The exponent bits of a number are the power of two below it, and 8 steps lie between two powers.
    """
    power_below = (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32).clamp_(min=_SMALLEST_NORMAL)
    step = power_below.mul_(0.125)
    return x.div_(step).round_().mul_(step)


@fake_quantize.register_fake
def _(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x)


def _straight_through(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None, None, None


fake_quantize.register_autograd(_straight_through)
