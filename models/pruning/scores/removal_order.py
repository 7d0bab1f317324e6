"""Removal order of a layer's units, and the cost of each, by OSSCAR or by importance scores.

Legend: U units, P inputs of a projection, D hidden, W inputs of a unit.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from models.architecture import DecoderLayer
from models.pruning.scores.curvature import Curvature, LayerCurvature
from models.pruning.scores.first_order import top_indices
from models.pruning.scores.importance import ImportanceScores
from models.pruning.scores.osscar import Elimination, Removal, eliminate, local_search

# Share of a Fisher matrix's mean diagonal that is added to its diagonal (as K-FAC does): a direction without gradient is not free.
METRIC_DAMPING = 1.0


class Ranking(Protocol):
    """An order of removal for each kind of unit."""

    def neurons(self, layer: DecoderLayer, keep: int, step: int) -> list[Removal]:
        """Rounds of `step` neurons, cheapest first, until `keep` are left."""

    def kv_groups(self, layer: DecoderLayer, keep: int) -> list[Removal]:
        """One key/value group after the other, with its query heads."""

    def query_heads(self, layer: DecoderLayer, groups: Sequence[int], each: int) -> list[int]:
        """The heads that stay, `each` in every group; numbered over the heads of these groups."""


class OsscarRanking:
    """Second-order costs, see `models.pruning.scores.osscar`: with the Fisher information of the outputs they are in nats.

    Args:
        curvature: Of every layer.
        ridge: Share of the mean diagonal that damps the Gram matrix.
        swaps: The most swaps of a local search after the removals, per layer and kind of unit.  With any, neurons and groups go in
            one single round: the search is for one number of units, and its choices for others are no parts of each other.
    """

    def __init__(self, curvature: Sequence[LayerCurvature], ridge: float, *, swaps: int = 0) -> None:
        self._curvature, self._ridge, self._swaps = curvature, ridge, swaps

    def neurons(self, layer: DecoderLayer, keep: int, step: int) -> list[Removal]:
        """See `Ranking`."""
        problem = self._problem(self._curvature[layer.index].down_proj, layer.down_proj.weight, layer.num_neurons)
        return self._refined(problem, eliminate(problem, keep, step=step))

    def kv_groups(self, layer: DecoderLayer, keep: int) -> list[Removal]:
        """See `Ranking`."""
        problem = self._problem(self._curvature[layer.index].o_proj, layer.o_proj.weight, layer.num_kv_groups)
        return self._refined(problem, eliminate(problem, keep))

    def query_heads(self, layer: DecoderLayer, groups: Sequence[int], each: int) -> list[int]:
        """See `Ranking`."""
        curvature, weight_DP = self._curvature[layer.index].o_proj, layer.o_proj.weight
        per_group = layer.num_query_heads // layer.num_kv_groups
        rows_P = torch.arange(weight_DP.shape[1]).unflatten(0, (layer.num_kv_groups, -1))[list(groups)].flatten()
        part = Curvature(curvature.gram_PP[rows_P][:, rows_P], curvature.fisher_DD)
        problem = self._problem(part, weight_DP[:, rows_P], len(groups) * per_group)
        eliminate(problem, len(groups) * each, classes=len(groups))
        local_search(problem, self._swaps, classes=len(groups))
        return problem.left.nonzero().squeeze(1).tolist()

    def _refined(self, problem: Elimination, rounds: list[Removal]) -> list[Removal]:
        if not self._swaps or not rounds:
            return rounds
        local_search(problem, self._swaps)
        return [Removal((~problem.left).nonzero().squeeze(1).tolist(), problem.cost)]

    def _problem(self, curvature: Curvature, weight_DP: Tensor, units: int) -> Elimination:
        metric_DD = curvature.fisher_DD.clone()
        metric_DD.diagonal().add_(METRIC_DAMPING * metric_DD.diagonal().mean())
        weight_PD = weight_DP.detach().T.cpu()
        return Elimination(curvature.gram_PP, weight_PD, units, ridge=self._ridge, metric_DD=metric_DD)


class ScoreRanking:
    """Lowest scores first; a removal costs its share of the layer's scores."""

    def __init__(self, scores: ImportanceScores) -> None:
        self._scores = scores

    def neurons(self, layer: DecoderLayer, keep: int, step: int) -> list[Removal]:
        """See `Ranking`."""
        return _ascending(self._scores.neurons[layer.index], keep, step)

    def kv_groups(self, layer: DecoderLayer, keep: int) -> list[Removal]:
        """See `Ranking`."""
        return _ascending(self._scores.kv_groups[layer.index], keep, 1)

    def query_heads(self, layer: DecoderLayer, groups: Sequence[int], each: int) -> list[int]:
        """See `Ranking`."""
        scores_GH = self._scores.query_heads[layer.index].unflatten(0, (layer.num_kv_groups, -1))[list(groups)]
        per_group = scores_GH.shape[1]
        return [
            group * per_group + head for group, scores_H in enumerate(scores_GH) for head in top_indices(scores_H, each)
        ]


def _ascending(scores_U: Tensor, keep: int, step: int) -> list[Removal]:
    """Rounds of the lowest scores; ties go as in `top_indices`, which keeps the lower index."""
    order = len(scores_U) - 1 - torch.argsort(scores_U.flip(0), stable=True)
    shares_U = scores_U.double()[order].cumsum(0) / scores_U.double().sum().clamp(min=torch.finfo(torch.float64).tiny)
    excess = len(order) - keep
    ends = range(excess % step or step, excess + 1, step)  # as `eliminate`, a smaller round comes first
    return [Removal(sorted(order[max(0, end - step) : end].tolist()), float(shares_U[end - 1])) for end in ends]
