"""Quantizes a layer on the inputs that it will actually receive: compensation, then rounding by the chosen method.

Legend: S tokens, I inputs, O outputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.calibration.least_squares import moment
from models.post_training.compensation import compensating
from models.post_training.rounding import Rounded, gptq, nearest, quantease
from models.post_training.settings import PostTrainingQuantization
from models.quantization.linear import FakeQuantizedLinear


def moment_of(
    linear: FakeQuantizedLinear,
    inputs: Sequence[Tensor],
    roots: Sequence[Tensor],
    outputs: Sequence[Tensor] | None = None,
) -> Tensor:
    """X^T Y (I, O) of a layer's inputs (S, I) as it rounds them and outputs (S, O), or X^T X, weighed by the squares of roots (S, 1)."""
    total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
    for number, (input_SI, root_S1) in enumerate(zip(inputs, roots, strict=True)):
        rounded_SI = input_SI if linear.input_quantizer is None else linear.input_quantizer(input_SI)
        other = rounded_SI if outputs is None else outputs[number]
        total = total + moment(rounded_SI * root_S1, other * root_S1).double()
    return total


@torch.no_grad()
def round_weight(
    linear: FakeQuantizedLinear, gram_II: Tensor | None, product_IO: Tensor | None, settings: PostTrainingQuantization
) -> None:
    """Round the weight of a layer, in place, and freeze its quantizer.

    An input quantizer is frozen before.  `gram_II` is X^T X of the inputs, None where the method does not look at them;
    `product_IO` is X^T Y with the outputs to aim at, see `models/post_training/compensation.py`, None for those of the
    weight.
    """
    if product_IO is not None:
        assert gram_II is not None
        linear.weight.copy_(compensating(linear.weight, gram_II, product_IO))
    rounded = _rounded(linear, gram_II, settings)
    linear.weight.copy_(rounded.weight_OI)
    linear.weight_quantizer.set_scales(rounded.scale, rounded.zero_point)


def _rounded(linear: FakeQuantizedLinear, gram_II: Tensor | None, settings: PostTrainingQuantization) -> Rounded:
    weight_OI, grid, search = linear.weight, linear.weight_quantizer.grid, settings.weight_search
    if gram_II is None or settings.method == "nearest":
        return nearest(weight_OI, grid, search=search)
    start = gptq(weight_OI, gram_II, grid, search=search, damping=settings.damping, ordered=True)
    if settings.method == "gptq":
        return start
    return quantease(weight_OI, gram_II, grid, start, damping=settings.damping, sweeps=settings.sweeps)
