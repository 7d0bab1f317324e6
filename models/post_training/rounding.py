"""Rounding a weight to its grid so that the outputs change least: to nearest, by GPTQ, by coordinate descent.

For inputs X with the Gram matrix H = X^T X, rounding W to V changes the outputs by tr((V - W) H (V - W)^T), summed over tokens.

- `nearest` looks at the weight alone.
- `gptq` rounds input after input and makes each error good in the inputs that still follow (arXiv 2210.17323).
- `quantease` improves what another method gave: input after input takes the grid value that is best while all others stay
  (arXiv 2309.01885), and between them every scale takes its best value, too.

The values returned lie on the grid of the scales returned: rounding them again changes no bit.

Legend: O outputs, I inputs, K inputs of a block, G blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.calibration.least_squares import damped
from models.quantization.fake_quantize import fake_quantize
from models.quantization.formats import Grid
from models.quantization.scales import SMALLEST_SCALE, Search, weight_scales

_BLOCK = 128  # inputs handled together where no group says how many


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid, float32, with scales and zero points as `weight_scales` gives them."""

    weight_OI: Tensor
    scale: Tensor
    zero_point: Tensor | None


def nearest(weight_OI: Tensor, grid: Grid, *, search: Search = "mse") -> Rounded:
    """Every value goes to the nearest one on the grid; scales are chosen as in `weight_scales`."""
    weight_OI = weight_OI.detach().float()
    scale, zero_point = weight_scales(weight_OI, grid, search)
    return Rounded(fake_quantize(weight_OI, scale, zero_point, grid.numbers, 0, grid.group_size), scale, zero_point)


def gptq(
    weight_OI: Tensor,
    gram_II: Tensor,
    grid: Grid,
    *,
    search: Search = "mse",
    damping: float = 0.01,
    ordered: bool = False,
) -> Rounded:
    """GPTQ, in the form of QuIP (arXiv 2307.13304), which gives the same values without an inverse.

    With H = M D M^T, M unit upper triangular, the error is the sum over inputs k of D_k |E M_k|^2 for E = W - V.  So the best value
    of an input, once those before it are rounded, is the one nearest to W_k + E_<k M_<k,k.  An input that was always zero is
    rounded to nearest.  D_k is also how much a squared rounding error of input k counts when scales of groups are searched (for
    scales of rows and tensors, which are finer, it makes no difference).

    The inputs are a multiple of the grid's group size.  Scales of a group are chosen when its turn comes, from the
    values that would then be best; all others from the weight, as are all where the inputs are `ordered`, those of
    large magnitude first.  `damping` is the share of H's mean diagonal that is added to it.

    Raises:
        ValueError: The damped Gram matrix is not positive definite.
    """
    order_I = gram_II.diagonal().argsort(descending=True) if ordered else torch.arange(len(gram_II))
    feedback_II, counts_I = _feedback(damped(gram_II, damping)[order_I][:, order_I])
    weight_OI = weight_OI.detach().float()
    importance_I = counts_I[order_I.argsort()] if grid.scales == "group" else None
    columns = _Columns(grid, *weight_scales(weight_OI, grid, search, importance_I))
    wanted_OI = weight_OI[:, order_I]
    values_OI, error_OI = torch.empty_like(wanted_OI), torch.empty_like(wanted_OI)
    for block, start in enumerate(range(0, len(order_I), columns.block)):
        end = min(start + columns.block, len(order_I))
        pull_OK = error_OI[:, :start] @ feedback_II[:start, start:end]
        if grid.scales == "group" and not ordered:
            feedback_KK = feedback_II[start:end, start:end]
            best_OK = torch.linalg.solve_triangular(feedback_KK, pull_OK, upper=True, left=False, unitriangular=True)
            columns.choose(block, wanted_OI[:, start:end] + best_OK, search, counts_I[start:end])
        for k in range(start, end):
            pull_O = pull_OK[:, k - start] + error_OI[:, start:k] @ feedback_II[start:k, k]
            values_OI[:, k] = columns.rounded(wanted_OI[:, k] + pull_O, int(order_I[k]))
            error_OI[:, k] = wanted_OI[:, k] - values_OI[:, k]
    return Rounded(values_OI[:, order_I.argsort()], columns.scale, columns.zero_point)


def quantease(
    weight_OI: Tensor,
    gram_II: Tensor,
    grid: Grid,
    start: Rounded,
    *,
    damping: float = 0.01,
    sweeps: int = 8,
    rescale: bool = True,
) -> Rounded:
    """Cyclic coordinate descent over values and scales; no step raises the error.

    It starts from what another method gave, and ends after so many `sweeps` over all inputs or where nothing changes
    any more.  Unless `rescale`, scales stay those of `start`.  `damping` is the share of H's mean diagonal that is
    added to it.
    """
    hessian_II = damped(gram_II, damping).float()
    weight_OI, values_OI = weight_OI.detach().float(), start.weight_OI.clone()
    columns = _Columns(grid, start.scale.clone(), None if start.zero_point is None else start.zero_point.clone())
    for _ in range(sweeps):
        before_OI = values_OI.clone()
        gradient_OI = (values_OI - weight_OI) @ hessian_II
        if rescale and grid.scales != "group":
            columns.rescale(None, values_OI, gradient_OI, hessian_II)
            gradient_OI = (values_OI - weight_OI) @ hessian_II
        for block, first in enumerate(range(0, len(hessian_II), columns.block)):
            inputs = slice(first, first + columns.block)
            hessian_KK, values_OK = hessian_II[inputs, inputs], values_OI[:, inputs]
            gradient_OK, old_OK = gradient_OI[:, inputs], values_OK.clone()
            if rescale and grid.scales == "group":
                columns.rescale(block, values_OK, gradient_OK, hessian_KK)
                gradient_OK = gradient_OK + (values_OK - old_OK) @ hessian_KK
            values_KO, gradient_KO = values_OK.T.contiguous(), gradient_OK.T.contiguous()
            for k, (value_O, slope_O) in enumerate(zip(values_KO, gradient_KO, strict=True)):
                best_O = columns.rounded(value_O - slope_O / hessian_KK[k, k], first + k)
                gradient_KO[k:].addr_(hessian_KK[k, k:], best_O - value_O)
                value_O.copy_(best_O)
            values_OK.copy_(values_KO.T)
            gradient_OI += (values_OK - old_OK) @ hessian_II[inputs]
        values_OI = columns.all_rounded(values_OI)
        if torch.equal(values_OI, before_OI):
            break
    return Rounded(values_OI, columns.scale, columns.zero_point)


class _Columns:
    """A weight's scales and zero points while its inputs are rounded one by one."""

    def __init__(self, grid: Grid, scale: Tensor, zero_point: Tensor | None) -> None:
        self.grid, self.scale, self.zero_point = grid, scale, zero_point
        self.block = grid.group_size or _BLOCK

    def choose(self, block: int, wanted_OK: Tensor, search: Search, importance_K: Tensor) -> None:
        """Take the scales of a group from its values."""
        scale_O1, zero_point_O1 = weight_scales(wanted_OK, self.grid, search, importance_K)
        self.scale[:, block] = scale_O1[:, 0]
        if self.zero_point is not None and zero_point_O1 is not None:
            self.zero_point[:, block] = zero_point_O1[:, 0]

    def rounded(self, wanted_O: Tensor, index: int) -> Tensor:
        """The values of one input on the grid."""
        if self.grid.scales != "group":
            return fake_quantize(wanted_O, self.scale, None, self.grid.numbers)
        group = index // self.block
        zero_point_O = None if self.zero_point is None else self.zero_point[:, group]
        return fake_quantize(wanted_O, self.scale[:, group], zero_point_O, self.grid.numbers)

    def all_rounded(self, values_OI: Tensor) -> Tensor:
        """All values on the grid."""
        return fake_quantize(values_OI, self.scale, self.zero_point, self.grid.numbers, 0, self.grid.group_size)

    def rescale(self, block: int | None, values_OK: Tensor, gradient_OK: Tensor, hessian_KK: Tensor) -> None:
        """Give scales their best values for the codes as they are, and change the values accordingly, in place.

        The error as a function of a scale is a parabola, so the best float16 number is the one nearest to its lowest point.
        """
        slope_O = (values_OK * gradient_OK).sum(1)
        bend_O = (values_OK @ hessian_KK * values_OK).sum(1)
        if self.grid.scales == "tensor":
            slope_O, bend_O = slope_O.sum(), bend_O.sum()
        scale = self.scale if block is None else self.scale[:, block]
        best = scale * (1 - slope_O / bend_O.clamp(min=torch.finfo(torch.float32).tiny))
        best = best.clamp(min=SMALLEST_SCALE).half().float()
        factor = best / scale
        values_OK *= factor if factor.dim() == 0 else factor[:, None]
        scale.copy_(best)


def _feedback(hessian_II: Tensor) -> tuple[Tensor, Tensor]:
    """M and D of H = M D M^T, M unit upper triangular, float32: from the Cholesky factor of H read backwards."""
    factor_II, failed = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
    if failed:
        raise ValueError(
            "expected a damped Gram matrix that is positive definite, found one that is not; raise the damping or use more "
            "calibration samples"
        )
    upper_II = factor_II.flip(0, 1)
    root_I = upper_II.diagonal()
    return (upper_II / root_I).float(), root_I.square().float()
