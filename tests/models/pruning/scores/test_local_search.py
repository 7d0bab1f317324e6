"""The search against the same rule over explicit least squares."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.pruning.scores.osscar import Elimination, eliminate, local_search
from tests.helpers.naive_least_squares import METRICS, P, draw, explicit, inputs_of, metric, problem

Cost = Callable[[set[int]], float]
SEEDS = range(30, 36)


def cost_function(x_SP: Tensor, weight_PD: Tensor, units: int, kind: str) -> Cost:
    return lambda gone: explicit(x_SP, weight_PD, inputs_of(sorted(gone), units), metric(kind))[1]


def gone_from(problem: Elimination) -> set[int]:
    return set((~problem.left).nonzero().squeeze(1).tolist())


def best_swap(cost: Cost, gone: set[int], members: set[int]) -> tuple[float, int, int]:
    """The cost after the swap that starts with the best return among some units, what comes back and what goes."""
    back = min(gone & members, key=lambda unit: cost(gone - {unit}))
    goes = min(members - gone | {back}, key=lambda unit: cost(gone - {back} | {unit}))
    return cost(gone - {back} | {goes}), back, goes


def naive_search(cost: Cost, gone: set[int], units: int) -> list[set[int]]:
    """What is gone at first, and after each swap until none of them helps."""
    choices = [gone]
    while True:
        after, back, goes = best_swap(cost, choices[-1], set(range(units)))
        if after >= cost(choices[-1]) * (1 - 1e-9):
            return choices
        choices.append(choices[-1] - {back} | {goes})


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("units", [P, 12])
@pytest.mark.parametrize(("start", "least"), [("greedy", 1), ("the dearer half", 3)])
def test_swaps_are_those_of_explicit_least_squares(start: str, least: int, units: int, kind: str) -> None:
    """With every budget, also with more than is needed: what is gone, its exact cost, and that it falls with every swap."""
    longest = 0
    for seed in SEEDS:
        x_SP, weight_PD = draw(seed)
        cost = cost_function(x_SP, weight_PD, units, kind)

        def begin(x_SP: Tensor = x_SP, weight_PD: Tensor = weight_PD) -> Elimination:
            begun = problem(x_SP, weight_PD, units, metric(kind))
            if start == "greedy":
                eliminate(begun, units // 2, step=units // 2)
            else:
                begun.remove(begun.costs().topk(units // 2).indices.tolist())
            return begun

        choices = naive_search(cost, gone_from(begin()), units)
        longest = max(longest, len(choices) - 1)
        reached = []
        for swaps in range(len(choices) + 1):
            searched = begin()
            assert local_search(searched, swaps) == min(swaps, len(choices) - 1)
            assert gone_from(searched) == choices[min(swaps, len(choices) - 1)]
            assert searched.cost == pytest.approx(cost(gone_from(searched)), rel=1e-6)
            reached.append(searched.cost)
        assert reached[0] == begin().cost
        assert reached[:-1] == sorted(set(reached[:-1]), reverse=True)
        assert reached[-1] == pytest.approx(reached[-2], rel=1e-9)
    assert longest >= least


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("seed", SEEDS)
def test_classes_swap_among_themselves_until_none_can(seed: int, kind: str) -> None:
    """12 units in 3 classes, from the worst start; at the end no class has a swap left that begins with its best return."""
    x_SP, weight_PD = draw(seed)
    cost = cost_function(x_SP, weight_PD, 12, kind)
    searched = problem(x_SP, weight_PD, 12, metric(kind))
    for of_class in range(3):
        for _ in range(2):
            costs = searched.costs().nan_to_num(posinf=-1)[4 * of_class : 4 * of_class + 4]
            searched.remove([4 * of_class + int(costs.argmax())])
    before = searched.cost
    done = local_search(searched, 1000, classes=3)
    assert 1 < done < 1000
    assert searched.left.unflatten(0, (3, 4)).sum(1).tolist() == [2, 2, 2]
    assert searched.cost < before
    gone = gone_from(searched)
    assert searched.cost == pytest.approx(cost(gone), rel=1e-6)
    for first in (0, 4, 8):
        assert best_swap(cost, gone, set(range(first, first + 4)))[0] >= cost(gone) * (1 - 1e-9)


@pytest.mark.parametrize("kind", METRICS)
def test_inputs_that_are_always_zero_stay_out(kind: str) -> None:
    """From a start that has removed others in their place: they are swapped first, and cost nothing then."""
    x_SP, weight_PD = draw(40)
    dead = [2, 11, 20]
    x_SP[:, dead], weight_PD[dead] = 0, 0
    cost = cost_function(x_SP, weight_PD, P, kind)
    searched = problem(x_SP, weight_PD, P, metric(kind))
    searched.remove([3, 12, 21, 22])
    assert local_search(searched, 3) == 3
    assert set(dead) < gone_from(searched)
    assert searched.cost == pytest.approx(cost(gone_from(searched)), rel=1e-6)
    only_dead = problem(x_SP, weight_PD, P, metric(kind))
    only_dead.remove(dead)
    assert local_search(only_dead, 100) == 0
    assert only_dead.cost == 0


@pytest.mark.parametrize("gone", [[], list(range(P))])
def test_nothing_to_swap(gone: list[int]) -> None:
    x_SP, weight_PD = draw(41)
    searched = problem(x_SP, weight_PD)
    searched.remove(gone)
    before = searched.cost
    assert local_search(searched, 10) == 0
    assert gone_from(searched) == set(gone)
    assert searched.cost == pytest.approx(before, rel=1e-9)


def test_a_long_search_stays_exact() -> None:
    """Hundreds of exchanges, from few tokens, where the ridge holds the problem up."""
    x_SP, weight_PD = draw(42, tokens=9)
    cost = cost_function(x_SP, weight_PD, P, "no metric")
    walk = problem(x_SP, weight_PD)
    generator = torch.Generator().manual_seed(43)
    for unit in torch.randint(P, (600,), generator=generator).tolist():
        if walk.left[unit]:
            walk.remove([unit])
        else:
            walk.restore([unit])
    local_search(walk, 1000)
    assert walk.cost == pytest.approx(cost(gone_from(walk)), rel=1e-6)
