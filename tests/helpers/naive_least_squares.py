"""Problems of pruning small enough for explicit least squares, in float64.

The reference is `torch.linalg.lstsq` on the stacked system [X; sqrt(ridge) I]: its squared residual is f(W) for H = X^T X + ridge.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.pruning.scores.osscar import Elimination

P, D, RIDGE = 24, 7, 0.01
METRICS = ("no metric", "metric", "metric of few samples")


def draw(seed: int = 0, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """Correlated inputs (S, P) of unlike sizes, and weights (P, D)."""
    generator = torch.Generator().manual_seed(seed)
    mixed_PP = torch.randn(P, P, generator=generator, dtype=torch.float64) + 2 * torch.eye(P)
    x_SP = torch.randn(tokens, P, generator=generator, dtype=torch.float64) @ mixed_PP * torch.linspace(0.1, 3, P)
    return x_SP, torch.randn(P, D, generator=generator, dtype=torch.float64)


def metric(kind: str) -> Tensor | None:
    if kind == "no metric":
        return None
    generator = torch.Generator().manual_seed(5)
    g_ND = torch.randn(4 * D if kind == "metric" else 3, D, generator=generator, dtype=torch.float64)
    return g_ND.T @ g_ND


def explicit(
    x_SP: Tensor, weight_PD: Tensor, gone: Sequence[int], metric_DD: Tensor | None = None, ridge: float = RIDGE
) -> tuple[Tensor, float]:
    """The best weights (P, D) without some inputs, and half their squared distance."""
    squares_P = x_SP.square().sum(0)
    strength = ridge * squares_P[squares_P > 0].mean()
    stacked = torch.cat([x_SP, strength.sqrt() * torch.eye(P, dtype=torch.float64)])
    kept = [p for p in range(P) if p not in gone]
    best = torch.zeros_like(weight_PD)
    if kept:
        best[kept] = torch.linalg.lstsq(stacked[:, kept], stacked @ weight_PD, driver="gelsd").solution
    error = stacked @ (best - weight_PD)
    metric_DD = torch.eye(D, dtype=torch.float64) if metric_DD is None else metric_DD
    return best, float(torch.trace(error.T @ error @ metric_DD)) / 2


def problem(x_SP: Tensor, weight_PD: Tensor, units: int = P, metric_DD: Tensor | None = None) -> Elimination:
    return Elimination(x_SP.T @ x_SP, weight_PD, units, ridge=RIDGE, metric_DD=metric_DD)


def inputs_of(units: Sequence[int], count: int) -> list[int]:
    width = P // count
    return [unit * width + i for unit in units for i in range(width)]
