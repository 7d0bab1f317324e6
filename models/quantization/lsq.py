"""Learned scales: the operator of `fake_quantize.py` with gradients for the scale and for clipped values.

Learned Step Size Quantization (Esser et al., arXiv 1902.08153), with v = x / s and the code q(v) that a value is rounded to, without
its zero point (equations 3 and 4):

|                               | gradient of the scale s | gradient of x |
|-------------------------------|-------------------------|---------------|
| v in the range of the codes   | q(v) - v                | 1             |
| v outside                     | q(v), the outermost one | 0             |

That is for a given x.  A weight that a solver has left on the grid has q(v) = v: its scale would receive nothing but rounding noise.
Such a weight *follows* its scale: its codes stay as they are while the scale moves, x = v s for a given v, and the gradient of s is q(v)
everywhere (scales trained over fixed codes: PEQA, arXiv 2305.14152, equation 2).  Who moves the scale then multiplies the weight, see
`learned_scales.py`.

The ends belong to the range, as in `torch.clamp`: rounding methods leave weights exactly there, and these must be able to move.

What the optimizer moves is the natural *logarithm* of the scale, and it is given the gradient of the scale itself.  AdamW moves any
parameter by about its learning rate: 1e-4 is little for a weight of 0.05, and a quarter of the FP8 scale of such weights.  On the
logarithm a step changes a scale by a share instead, and a scale stays positive.

The operator computes with the float16 number next to the exponential, so all graphs hold the scale that was trained; the
gradient passes straight through that rounding.
"""

import torch
from torch import Tensor

from models.quantization.fake_quantize import fake_quantize, in_blocks, in_shape_of, on_grid
from models.quantization.formats import RANGES
from models.quantization.scales import SMALLEST_SCALE

_LARGEST_SCALE = 65504.0  # the largest float16


def scale_of(log_scale: Tensor) -> Tensor:
    """The scales behind their logarithms (any shape): the nearest float16 numbers, normal ones, in float32."""
    return log_scale.exp().clamp(SMALLEST_SCALE, _LARGEST_SCALE).half().float()


def log_of(scale: Tensor) -> Tensor:
    """The logarithms of scales (any shape), float32; what `scale_of` takes back to the same scales."""
    return scale.clamp(min=SMALLEST_SCALE).log()


@torch.library.custom_op("potstill::fake_quantize_learned", mutates_args=())
def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    log_scale: Tensor,
    factor: float,
    zero_point: Tensor | None = None,
    numbers: str = "fp8_e4m3",
    axis: int = 0,
    block_size: int = 0,
    follows: bool = False,
) -> Tensor:
    """`fake_quantize` with the gradients of the module's table, that of the scale multiplied by `factor`.

    Arguments that both have mean the same.  `scale` is `scale_of(log_scale)`, and `log_scale`, float32 of its shape, receives its
    gradient.  `factor` is LSQ's gradient scale, (values that share a scale * largest code) ** -0.5.  Where x `follows`, it is
    multiplied when the scale moves, so that its codes stay.
    """
    return fake_quantize(x, scale, zero_point, numbers, axis, block_size)


@fake_quantize_learned.register_fake
def _(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, scale, _, ctx.factor, zero_point, *ctx.layout, ctx.follows = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(x, scale, zero_point)  # type: ignore[arg-type]


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
    numbers, axis, block_size = ctx.layout  # type: ignore[attr-defined]
    codes, spread_scale, zero_point = on_grid(x, scale, zero_point, numbers, axis, block_size)
    low: float | Tensor
    high: float | Tensor
    low, high = RANGES[numbers]
    if zero_point is not None:
        codes.sub_(zero_point)
        low, high = low - zero_point.float(), high - zero_point.float()  # int8 would overflow
    grad_in_blocks = in_blocks(grad, block_size) if block_size else grad
    quotient = (in_blocks(x, block_size) if block_size else x).float() / spread_scale
    inside = (quotient >= low) & (quotient <= high)
    grad_x = in_shape_of(x, grad_in_blocks.masked_fill(~inside, 0))
    slope = codes if ctx.follows else codes.sub_(quotient.masked_fill_(~inside, 0))  # type: ignore[attr-defined]
    grad_scale = slope.mul_(grad_in_blocks).sum_to_size(spread_scale.shape).view_as(scale).mul(ctx.factor)  # type: ignore[attr-defined]
    return grad_x, None, grad_scale, None, None, None, None, None, None


fake_quantize_learned.register_autograd(_gradients, setup_context=_save)
