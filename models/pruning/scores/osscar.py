"""Second-order pruning of the inputs of a linear layer, with repair of what is kept (OSSCAR, arXiv 2403.12983).

For a layer y = x W the error on calibration inputs X is f(W) = 1/2 tr((W - W0)^T H (W - W0)) with H = X^T X + ridge.  Removing the
inputs S and refitting the other rows of W costs exactly 1/2 tr(W_S^T [(H^-1)_SS]^-1 W_S); the inverse without S follows from the
old one by a downdate, so that a greedy search re-scores all units after every removal; a removal can be taken back in the same way.
Everything is computed in float64.

An output metric A turns the error into 1/2 tr((W - W0)^T H (W - W0) A): with the Fisher information of the outputs as A, a cost is
an increase of the KL divergence in nats (Kronecker-factored curvature, arXiv 1503.05671).  It changes what is removed, and not how
the rest is best chosen, so repairs need no metric.

Legend: S tokens, P inputs, D outputs, U units (each of P / U consecutive inputs), W inputs of a unit, K kept inputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.calibration.least_squares import damped, factor


@dataclass(frozen=True)
class Removal:
    """One round of the greedy search: the units that went, ascending, and the cost of all removals so far."""

    units: list[int]
    cost: float


class Elimination:
    """The inputs of a linear layer while units are removed from it, and put back.

    What is kept and what is gone are two halves of one linear system.  With the multipliers Z = H (W0 - W), which are zero for kept
    inputs as W is for the others, the half that is not zero is linear in the half that is:

        (W_K, Z_R) = solution - tableau (Z_K, W_R)

    At first all is kept: the solution is W0 and the tableau H^-1.  To remove or put back a unit is to exchange its W and Z, one
    pivot step, and what that changes in the error is 1/2 tr(s^T t^-1 s) of the unit's own rows s and block t, in both directions: a
    block is [H^-1]_SS while the unit is kept, and its Schur complement H_SS - H_SK H_KK^-1 H_KS while it is gone.

    Args:
        gram_PP: X^T X over the calibration tokens.
        weight_PD: Weights, transposed from how torch keeps them.
        units: Number of units.
        ridge: Share of the mean diagonal that is added to the diagonal.
        metric_DD: Symmetric positive semidefinite output metric A; None for the plain error.

    Attributes:
        left: Which units are left, (U,) bool.
        cost: What the removal of all others costs.

    Raises:
        ValueError: H is not positive definite.
    """

    def __init__(
        self, gram_PP: Tensor, weight_PD: Tensor, units: int, *, ridge: float, metric_DD: Tensor | None = None
    ) -> None:
        weight_PD = weight_PD.double()
        if metric_DD is not None:
            weight_PD = weight_PD @ _root(metric_DD)
        # An input that is always zero adds nothing to the output: removing it costs nothing, whatever its weights are.
        self._solution_PD = weight_PD * (gram_PP.diagonal() > 0)[:, None]
        self._tableau_PP = torch.cholesky_inverse(factor(damped(gram_PP, ridge)))
        self._rows_UW = torch.arange(len(gram_PP)).unflatten(0, (units, -1))
        self.left = torch.ones(units, dtype=torch.bool)
        self.cost = 0.0

    def costs(self) -> Tensor:
        """What removing each unit alone would add to the error, (U,); infinite for those that are gone."""
        return self._changes(self.left).masked_fill(~self.left, math.inf)

    def gains(self) -> Tensor:
        """What putting each unit alone back would take from the error, (U,); minus infinite for those that are left."""
        return self._changes(~self.left).masked_fill(self.left, -math.inf)

    def remove(self, units: Sequence[int]) -> float:
        """Remove units together; returns what that adds to the error, exactly."""
        added = self._exchange(units)
        self.cost += added
        return added

    def restore(self, units: Sequence[int]) -> float:
        """Put units back together; returns what that takes from the error, exactly."""
        taken = self._exchange(units)
        self.cost -= taken
        return taken

    def _changes(self, asked_U: Tensor) -> Tensor:
        if self._rows_UW.shape[1] == 1:
            squares_U = self._solution_PD.square().sum(1)
            return squares_U / self._tableau_PP.diagonal().clamp(min=torch.finfo(torch.float64).tiny) / 2
        blocks_UWW = torch.stack([self._tableau_PP[rows_W][:, rows_W] for rows_W in self._rows_UW])
        blocks_UWW[~asked_U] = torch.eye(blocks_UWW.shape[1], dtype=torch.float64)
        solution_UWD = self._solution_PD[self._rows_UW]
        return (solution_UWD * torch.cholesky_solve(solution_UWD, torch.linalg.cholesky(blocks_UWW))).sum((1, 2)) / 2

    def _exchange(self, units: Sequence[int]) -> float:
        rows_S = self._rows_UW[list(units)].flatten()
        columns_PS, solution_SD = self._tableau_PP[:, rows_S], self._solution_PD[rows_S]
        # Not by LU: a batch of such systems has hung in oneMKL.
        factor_SS = torch.linalg.cholesky(columns_PS[rows_S])
        inverse_SS = torch.cholesky_inverse(factor_SS)
        solved_SP = torch.cholesky_solve(self._tableau_PP[rows_S], factor_SS)
        solved_SD = torch.cholesky_solve(solution_SD, factor_SS)
        self._tableau_PP.addmm_(columns_PS, solved_SP, alpha=-1)
        self._tableau_PP[rows_S] = solved_SP
        self._tableau_PP[:, rows_S] = -columns_PS @ inverse_SS
        self._tableau_PP[rows_S[:, None], rows_S] = inverse_SS
        self._solution_PD.addmm_(columns_PS, solved_SD, alpha=-1)
        self._solution_PD[rows_S] = solved_SD
        self.left[list(units)] ^= True
        return float((solution_SD * solved_SD).sum()) / 2


def eliminate(problem: Elimination, keep: int, *, step: int = 1, classes: int = 1) -> list[Removal]:
    """Remove the cheapest units, round after round, until `keep` are left.

    `step` units are removed between two scorings in every class; the first round may be smaller, so that what is left
    after any round is `keep` and a multiple of it.  Units fall into so many `classes` of equal, consecutive units that
    must lose equally many (query heads of the key/value groups), and `keep` is a multiple of it.  Returned are the
    rounds in order.
    """
    rounds: list[Removal] = []
    excess = (int(problem.left.sum()) - keep) // classes
    while excess > 0:
        count = excess % step or step
        costs_CN = problem.costs().unflatten(0, (classes, -1))
        chosen_CN = costs_CN.topk(count, dim=1, largest=False).indices
        units = (chosen_CN + torch.arange(classes)[:, None] * costs_CN.shape[1]).flatten().sort().values.tolist()
        problem.remove(units)
        rounds.append(Removal(units, problem.cost))
        excess -= count
    return rounds


def local_search(problem: Elimination, swaps: int, *, classes: int = 1) -> int:
    """After `eliminate`: units that are gone change places with units that are kept, for as long as the error falls.

    A swap puts back the unit whose return takes most from the error, and then removes the one that is cheapest now.  Where that is
    the same one, no swap of it helps, and the search is over.  (One of a unit that is worth less could still help: to know, all
    pairs would have to be tried.)

    At most so many swaps are done, and how many were is returned.  With `classes`, as in `eliminate`, a unit changes
    places with one of its own class, and the search goes on until it is over in all.
    """
    done = 0
    open_C = torch.ones(classes, dtype=torch.bool)
    while done < swaps:
        gains_CN = problem.gains().unflatten(0, (classes, -1)).masked_fill(~open_C[:, None], -math.inf)
        gain, back = gains_CN.max(), int(gains_CN.argmax())
        if gain <= 0:
            break
        of_class = back // gains_CN.shape[1]
        problem.restore([back])
        costs_N = problem.costs().unflatten(0, (classes, -1))[of_class]
        gone = of_class * len(costs_N) + int(costs_N.argmin())
        if gone != back and costs_N.min() < gain:
            problem.remove([gone])
            done += 1
            open_C[:] = True
        else:
            problem.remove([back])
            open_C[of_class] = False
    return done


def _root(metric_DD: Tensor) -> Tensor:
    """R with R R^T = A, from eigenvectors: a Fisher matrix of few samples has no Cholesky factor."""
    values_D, vectors_DD = torch.linalg.eigh(metric_DD.double())
    return vectors_DD * values_D.clamp(min=0).sqrt()
