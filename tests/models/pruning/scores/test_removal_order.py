"""Rankings by second-order costs and by scores, against explicit least squares and against sorting."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.architecture import decoder_layers
from models.pruning.scores.curvature import Curvature, LayerCurvature, collect_curvature
from models.pruning.scores.first_order import random_scores, top_indices
from models.pruning.scores.importance import ImportanceScores
from models.pruning.scores.removal_order import METRIC_DAMPING, OsscarRanking, ScoreRanking
from tests.helpers.masking import cut_model
from tests.helpers.tiny import tiny_batch

RIDGE = 0.01


def with_plain_metric(curvature: list[LayerCurvature]) -> list[LayerCurvature]:
    def replaced(part: Curvature) -> Curvature:
        return Curvature(part.gram_PP, torch.eye(32, dtype=torch.float64))

    return [LayerCurvature(replaced(layer.o_proj), replaced(layer.down_proj)) for layer in curvature]


def explicit_costs(gram_PP: Tensor, weight_DP: Tensor, units: int) -> list[float]:
    """Half the squared error of the best least-squares fit without each unit, from a root of the Gram matrix."""
    strength = RIDGE * gram_PP.diagonal().mean()
    root_PP = torch.linalg.cholesky(gram_PP + strength * torch.eye(len(gram_PP))).T
    aim_PD = root_PP @ weight_DP.detach().T.double()
    costs = []
    for columns in torch.arange(len(gram_PP)).chunk(units):
        kept = [p for p in range(len(gram_PP)) if p not in columns.tolist()]
        best = torch.linalg.lstsq(root_PP[:, kept], aim_PD).solution
        costs.append(float((root_PP[:, kept] @ best - aim_PD).square().sum()) / 2)
    return costs


@pytest.fixture(scope="module")
def measured() -> tuple[PreTrainedModel, list[LayerCurvature]]:
    model = cut_model("llama")
    return model, collect_curvature(model, [tiny_batch()])


def test_first_to_go_is_what_least_squares_misses_least(
    measured: tuple[PreTrainedModel, list[LayerCurvature]],
) -> None:
    """A damped identity metric is a constant factor."""
    model, curvature = measured
    factor = 1 + METRIC_DAMPING
    ranking = OsscarRanking(with_plain_metric(curvature), RIDGE)
    for layer, statistics in zip(decoder_layers(model), curvature, strict=True):
        neurons = explicit_costs(statistics.down_proj.gram_PP, layer.down_proj.weight, 48)
        first = ranking.neurons(layer, 47, 1)[0]
        assert first.units == [neurons.index(min(neurons))]
        assert first.cost == pytest.approx(factor * min(neurons), rel=1e-6)
        groups = explicit_costs(statistics.o_proj.gram_PP, layer.o_proj.weight, 4)
        first = ranking.kv_groups(layer, 3)[0]
        assert first.units == [groups.index(min(groups))]
        assert first.cost == pytest.approx(factor * min(groups), rel=1e-6)
        heads = torch.tensor(explicit_costs(statistics.o_proj.gram_PP, layer.o_proj.weight, 8))
        kept = ranking.query_heads(layer, range(4), 1)
        assert int(heads.argmin()) not in kept


@pytest.mark.parametrize("groups", [[0, 1, 2, 3], [1, 3], [2]])
def test_query_heads_are_equally_many_in_each_group(
    measured: tuple[PreTrainedModel, list[LayerCurvature]], groups: list[int]
) -> None:
    """Numbered over the heads of the groups that are left; other groups do not matter."""
    model, curvature = measured
    ranking = OsscarRanking(curvature, RIDGE)
    layer = decoder_layers(model)[1]
    kept = ranking.query_heads(layer, groups, 1)
    assert kept == sorted(kept)
    assert [head // 2 for head in kept] == list(range(len(groups)))
    assert ranking.query_heads(layer, groups, 2) == list(range(2 * len(groups)))


def test_the_cheaper_head_of_a_single_group_goes(measured: tuple[PreTrainedModel, list[LayerCurvature]]) -> None:
    model, curvature = measured
    layer, columns = decoder_layers(model)[1], slice(32, 48)
    costs = explicit_costs(curvature[1].o_proj.gram_PP[columns, columns], layer.o_proj.weight[:, columns], 2)
    kept = OsscarRanking(with_plain_metric(curvature), RIDGE).query_heads(layer, [2], 1)
    assert kept == [costs.index(max(costs))]


def test_the_fisher_information_decides(measured: tuple[PreTrainedModel, list[LayerCurvature]]) -> None:
    """A neuron that writes, with the largest weights of all, where gradients are hardly felt goes before one they feel."""
    _, curvature = measured
    fisher_DD = torch.zeros(32, 32, dtype=torch.float64)
    fisher_DD[0, 0] = 1e4
    layer = decoder_layers(cut_model("llama"))[0]
    with torch.no_grad():
        layer.down_proj.weight[:, 7] = 0
        layer.down_proj.weight[0, 7] = layer.down_proj.weight.abs().max()
        layer.down_proj.weight[:, 8] = 0
        layer.down_proj.weight[1, 8] = 2 * layer.down_proj.weight.abs().max()
        layer.down_proj.weight[0, :7] = 1
        layer.down_proj.weight[0, 9:] = 1
    gram_PP = torch.eye(48, dtype=torch.float64)
    seen = LayerCurvature(curvature[0].o_proj, Curvature(gram_PP, fisher_DD))
    blind = LayerCurvature(curvature[0].o_proj, Curvature(gram_PP, torch.eye(32, dtype=torch.float64)))
    assert OsscarRanking([seen], RIDGE).neurons(layer, 47, 1)[0].units == [8]
    assert OsscarRanking([blind], RIDGE).neurons(layer, 47, 1)[0].units != [8]


@pytest.mark.parametrize("kind", ["neurons", "kv_groups"])
def test_a_search_refines_the_choice_in_one_round(
    measured: tuple[PreTrainedModel, list[LayerCurvature]], kind: str
) -> None:
    model, curvature = measured
    refinements = 0
    for layer in decoder_layers(model):
        arguments = (layer, 24, 24) if kind == "neurons" else (layer, 2)
        rounds = getattr(OsscarRanking(curvature, RIDGE), kind)(*arguments)
        (refined,) = getattr(OsscarRanking(curvature, RIDGE, swaps=100), kind)(*arguments)
        removed = sorted(unit for removal in rounds for unit in removal.units)
        assert refined.units == sorted(refined.units)
        assert len(refined.units) == len(removed)
        if refined.units == removed:
            assert refined.cost == pytest.approx(rounds[-1].cost)
        else:
            assert refined.cost < rounds[-1].cost
            refinements += 1
    assert refinements or kind == "kv_groups"
    assert OsscarRanking(curvature, RIDGE, swaps=100).neurons(decoder_layers(model)[0], 48, 8) == []


def test_a_search_keeps_as_many_heads_in_each_group(measured: tuple[PreTrainedModel, list[LayerCurvature]]) -> None:
    model, curvature = measured
    layer = decoder_layers(model)[1]
    kept = OsscarRanking(curvature, RIDGE, swaps=100).query_heads(layer, [0, 1, 3], 1)
    assert [head // 2 for head in kept] == [0, 1, 2]


# Scores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5, 16])
@pytest.mark.parametrize("keep", [1, 16, 30, 47, 48])
def test_scores_keep_the_top_indices(keep: int, step: int) -> None:
    """Ties included; what is left after any round is what `top_indices` keeps, and a multiple of the step more than at the end."""
    model = cut_model("llama")
    scores = random_scores(model, seed=1)
    scores.neurons[0] = (10 * scores.neurons[0]).round() / 10
    ranking, layer = ScoreRanking(scores), decoder_layers(model)[0]
    left = set(range(48))
    rounds = ranking.neurons(layer, keep, step)
    for one in rounds:
        left -= set(one.units)
        assert one.units == sorted(one.units)
        assert sorted(left) == top_indices(scores.neurons[0], len(left))
        assert (len(left) - keep) % step == 0
        gone = [unit for unit in range(48) if unit not in left]
        assert one.cost == pytest.approx(float(scores.neurons[0][gone].sum() / scores.neurons[0].sum()), abs=1e-6)
    assert len(left) == keep
    assert [one.cost for one in rounds] == sorted(one.cost for one in rounds)


def test_groups_and_heads_by_their_scores() -> None:
    model = cut_model("llama")
    heads = torch.tensor([1.0, 9.0, 3.0, 2.0, 8.0, 8.0, 0.0, 4.0])
    groups = torch.tensor([3.0, 1.0, 4.0, 2.0])
    ranking = ScoreRanking(ImportanceScores([torch.ones(48)] * 3, [heads] * 3, [groups] * 3, torch.ones(32)))
    layer = decoder_layers(model)[2]
    rounds = ranking.kv_groups(layer, 1)
    assert [one.units for one in rounds] == [[1], [3], [0]]
    assert [one.cost for one in rounds] == pytest.approx([0.1, 0.3, 0.6])
    assert ranking.query_heads(layer, range(4), 1) == [1, 2, 4, 7]
    assert ranking.query_heads(layer, [1, 3], 1) == [0, 3]
    assert ranking.query_heads(layer, [1, 3], 2) == [0, 1, 2, 3]


def test_scores_that_are_all_zero_cost_nothing() -> None:
    model = cut_model("llama")
    ranking = ScoreRanking(ImportanceScores([torch.zeros(48)], [torch.zeros(8)], [torch.zeros(4)], torch.zeros(32)))
    rounds = ranking.kv_groups(decoder_layers(model)[0], 2)
    assert [(one.units, one.cost) for one in rounds] == [([3], 0), ([2], 0)]
