"""FP8 E4M3 fake quantization: one function for training, ONNX export and the engine.

E4M3 ("fn": finite, with NaN, without infinities; FP8 Formats for Deep Learning, arXiv 2209.05433) has a maximum of 448, a
smallest normal of 2**-6 and a smallest subnormal of 2**-9.  With the dequantization multiplier `scale`,

    fake_quantize_fp8(x, scale) = cast_e4m3(clamp(x / scale, -448, 448)) * scale

The division is done in float32 whatever the dtype of x.  The function is a custom operator, so `torch.export` keeps it whole
and `export/to_onnx.py` writes it as QuantizeLinear / DequantizeLinear, which compute the same bits.
"""

import torch
from torch import Tensor

E4M3_MAX = 448.0
_SMALLEST_NORMAL = 2.0**-6
_EXPONENT_BITS = 0x7F800000  # of a float32
_SMALLEST_SCALE = 2.0**-14  # the smallest normal float16: scales must survive in half-precision graphs


def scale_from_amax(amax: Tensor) -> Tensor:
    """The per-tensor scale that maps `amax` (largest magnitude, any shape) onto 448, in float32.

    The scale is rounded *up* to a float16 number: float32 and float16 graphs and engines then hold the very same scale, and
    no value in range is clipped by the rounding.
    """
    scale = (amax.float() / E4M3_MAX).clamp(min=_SMALLEST_SCALE)
    half = scale.half()
    rounded_down = half.float() < scale
    up = torch.nextafter(half, torch.full_like(half, torch.inf))
    return torch.where(rounded_down, up, half).float()


@torch.library.custom_op("potstill::fake_quantize_fp8", mutates_args=())
def fake_quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Round x to the FP8 E4M3 grid of `scale`; straight-through gradient.

    Args:
        x: Any shape and floating dtype.
        scale: Scalar float32 dequantization multiplier, see `scale_from_amax`; receives no gradient.

    Returns:
        A tensor like x whose values lie on the grid.
    """
    grid = (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX)
    # Rounding by arithmetic gives the bits of a cast to float8_e4m3fn and back, two to three times as fast on a CPU:
    # the exponent bits of a number are the power of two below it, and 8 steps lie between two powers.
    power_below = (grid.view(torch.int32) & _EXPONENT_BITS).view(torch.float32).clamp_(min=_SMALLEST_NORMAL)
    step = power_below.mul_(0.125)
    return grid.div_(step).round_().mul_(step).mul_(scale).to(x.dtype)


@fake_quantize_fp8.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_range(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    pass


def _straight_through(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


fake_quantize_fp8.register_autograd(_straight_through, setup_context=_save_range)
