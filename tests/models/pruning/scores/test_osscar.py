"""Removal costs and repaired weights against explicit least squares."""

import math

import pytest
import torch

from models.calibration.least_squares import damped, moment, refit
from models.pruning.scores.osscar import Elimination, Removal, eliminate
from tests.helpers.naive_least_squares import METRICS, RIDGE, D, P, draw, explicit, inputs_of, metric, problem


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("units", [P, 8, 2])
def test_costs_are_those_of_the_best_repair(units: int, kind: str) -> None:
    x_SP, weight_PD = draw()
    found = problem(x_SP, weight_PD, units, metric(kind)).costs().tolist()
    expected = [explicit(x_SP, weight_PD, inputs_of([unit], units), metric(kind))[1] for unit in range(units)]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize(("units", "gone"), [(P, [3]), (P, [0, 5, 23]), (8, [6, 1]), (8, list(range(7))), (2, [0, 1])])
def test_joint_removals(units: int, gone: list[int], kind: str) -> None:
    """A metric changes costs, and not the best weights."""
    x_SP, weight_PD = draw(1)
    removal = problem(x_SP, weight_PD, units, metric(kind))
    inputs = inputs_of(gone, units)
    expected = explicit(x_SP, weight_PD, inputs, metric(kind))[1]
    assert removal.remove(gone) == pytest.approx(expected, rel=1e-6)
    assert removal.cost == pytest.approx(expected, rel=1e-6)
    assert removal.left.tolist() == [unit not in gone for unit in range(units)]


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("units", [P, 8])
def test_downdates_stay_exact_until_nothing_is_left(units: int, kind: str) -> None:
    x_SP, weight_PD = draw(2)
    removal = problem(x_SP, weight_PD, units, metric(kind))
    gone: list[int] = []
    order = torch.randperm(units, generator=torch.Generator().manual_seed(3)).tolist()
    for unit in order:
        alone = removal.costs()
        for other in order:
            if other in gone:
                assert alone[other] == math.inf
            else:
                inputs = inputs_of([*gone, other], units)
                expected = explicit(x_SP, weight_PD, inputs, metric(kind))[1]
                assert removal.cost + float(alone[other]) == pytest.approx(expected, rel=1e-6)
        assert removal.remove([unit]) == pytest.approx(float(alone[unit]), rel=1e-6)
        gone.append(unit)
    assert not removal.left.any()


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("units", [P, 8])
def test_back_and_forth(units: int, kind: str) -> None:
    """After every removal and every return: the cost so far, what each unit left would add, what each that is gone would take."""
    x_SP, weight_PD = draw(14)
    walk = problem(x_SP, weight_PD, units, metric(kind))

    def cost(gone: set[int]) -> float:
        return explicit(x_SP, weight_PD, inputs_of(sorted(gone), units), metric(kind))[1]

    gone: set[int] = set()
    for together in ([0, 5, 6], [5], [1, 2], [0, 1], [7], [2, 6, 7], [3]):
        if gone.issuperset(together):
            before = cost(gone)
            gone -= set(together)
            assert walk.restore(together) == pytest.approx(before - cost(gone), rel=1e-6)
        else:
            gone |= set(together)
            walk.remove(together)
        assert walk.cost == pytest.approx(cost(gone), rel=1e-6, abs=1e-9)
        assert [unit for unit in range(units) if not walk.left[unit]] == sorted(gone)
        costs, gains = walk.costs(), walk.gains()
        for unit in range(units):
            if unit in gone:
                assert costs[unit] == math.inf
                assert float(gains[unit]) == pytest.approx(cost(gone) - cost(gone - {unit}), rel=1e-6)
            else:
                assert gains[unit] == -math.inf
                assert float(costs[unit]) == pytest.approx(cost(gone | {unit}) - cost(gone), rel=1e-6)


@pytest.mark.parametrize("tokens", [60, 9])
@pytest.mark.parametrize("gone", [[], [4], [0, 5, 6, 23], list(range(1, P))])
def test_refitted_weights(gone: list[int], tokens: int) -> None:
    """Also from fewer tokens than inputs, which the ridge makes up for."""
    x_SP, weight_PD = draw(4, tokens)
    hessian_PP = damped(x_SP.T @ x_SP, RIDGE)
    kept_K = torch.tensor([p for p in range(P) if p not in gone])
    expected = explicit(x_SP, weight_PD, gone)[0][kept_K]
    torch.testing.assert_close(refit(hessian_PP, hessian_PP @ weight_PD, kept_K), expected, rtol=1e-6, atol=1e-9)


def test_refit_to_other_outputs_pulled_towards_the_weights() -> None:
    x_SP, weight_PD = draw(5)
    y_SD = x_SP @ weight_PD + torch.randn(60, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    hessian_PP, strength = damped(x_SP.T @ x_SP, RIDGE), RIDGE * x_SP.square().sum(0).mean()
    stacked = torch.cat([x_SP, strength.sqrt() * torch.eye(P, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([y_SD, strength.sqrt() * weight_PD])).solution
    found = refit(hessian_PP, x_SP.T @ y_SD + strength * weight_PD, torch.arange(P))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_fewer_tokens_than_inputs() -> None:
    x_SP, weight_PD = draw(6, tokens=9)
    removal = problem(x_SP, weight_PD)
    expected = [explicit(x_SP, weight_PD, [p])[1] for p in range(P)]
    assert removal.costs().tolist() == pytest.approx(expected, rel=1e-6)
    for p in range(0, P, 2):
        removal.remove([p])
    assert removal.cost == pytest.approx(explicit(x_SP, weight_PD, range(0, P, 2))[1], rel=1e-6)


@pytest.mark.parametrize("kind", METRICS)
def test_inputs_that_are_always_zero_cost_nothing_and_go_first(kind: str) -> None:
    x_SP, weight_PD = draw(7)
    dead = [2, 11, 20]
    x_SP[:, dead] = 0
    removal = problem(x_SP, weight_PD, metric_DD=metric(kind))
    assert removal.costs()[dead].tolist() == [0, 0, 0]
    assert eliminate(removal, P - 4, step=3)[-1].units != dead
    rounds = eliminate(problem(x_SP, weight_PD, metric_DD=metric(kind)), P - 3)
    assert sorted(removal.units[0] for removal in rounds) == dead
    assert rounds[-1].cost == 0
    hessian_PP = damped(x_SP.T @ x_SP, RIDGE)
    kept_K = torch.tensor([p for p in range(P) if p not in dead])
    torch.testing.assert_close(refit(hessian_PP, hessian_PP @ weight_PD, kept_K), weight_PD[kept_K])


def test_zeros_do_not_dilute_the_ridge() -> None:
    gram_PP = torch.diag(torch.tensor([2.0, 0.0, 4.0]))
    torch.testing.assert_close(damped(gram_PP, 0.1).diagonal(), torch.tensor([2.3, 0.3, 4.3], dtype=torch.float64))
    assert gram_PP[1, 1] == 0
    assert Elimination(torch.zeros(3, 3), torch.ones(3, 2), 3, ridge=0.1).costs().tolist() == [0, 0, 0]


@pytest.mark.parametrize("tokens", [P, P - 1, 3])
def test_a_singular_problem_without_ridge_is_refused(tokens: int) -> None:
    """One token short is where a factorisation may succeed on rounding errors alone."""
    x_SP, weight_PD = draw(8, tokens)
    gram_PP = x_SP.T @ x_SP
    if tokens == P:
        assert Elimination(gram_PP, weight_PD, P, ridge=0).costs().isfinite().all()
        return
    wanted = "expected calibration statistics .* positive definite, found one that is not; raise the ridge"
    with pytest.raises(ValueError, match=wanted):
        Elimination(gram_PP, weight_PD, P, ridge=0)
    with pytest.raises(ValueError, match=wanted):
        refit(damped(gram_PP, 0), gram_PP @ weight_PD, torch.arange(P))
    Elimination(gram_PP, weight_PD, P, ridge=1e-6)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("units", [P, 8])
def test_of_one_removal_the_cheapest_of_all_is_found(units: int, seed: int, kind: str) -> None:
    x_SP, weight_PD = draw(seed)
    costs = [explicit(x_SP, weight_PD, inputs_of([unit], units), metric(kind))[1] for unit in range(units)]
    found = eliminate(problem(x_SP, weight_PD, units, metric(kind)), units - 1)
    assert found == [Removal([costs.index(min(costs))], pytest.approx(min(costs), rel=1e-6))]


def test_greedy_rounds_score_anew() -> None:
    """Of two equal inputs either is free, and both together are not."""
    x_SP, weight_PD = draw(9)
    x_SP[:, 1] = x_SP[:, 0]
    weight_PD[:2] *= 100
    removal = Elimination(x_SP.T @ x_SP, weight_PD, P, ridge=1e-9)
    rounds = eliminate(removal, P - 6)
    assert rounds[0].units in ([0], [1])
    assert removal.left[:2].sum() == 1


@pytest.mark.parametrize(
    ("keep", "step", "sizes"), [(10, 1, [1] * 14), (10, 4, [2, 4, 4, 4]), (4, 5, [5] * 4), (24, 3, [])]
)
def test_rounds(keep: int, step: int, sizes: list[int]) -> None:
    """Costs are of all removals so far and rise; a round removes what is cheapest when it begins."""
    x_SP, weight_PD = draw(10)
    removal = problem(x_SP, weight_PD)
    rounds = eliminate(removal, keep, step=step)
    assert [len(one.units) for one in rounds] == sizes
    gone: list[int] = []
    for one in rounds:
        alone = [math.inf if p in gone else explicit(x_SP, weight_PD, [*gone, p])[1] for p in range(P)]
        assert one.units == sorted(sorted(range(P), key=lambda p: alone[p])[: len(one.units)])
        gone += one.units
        assert one.cost == pytest.approx(explicit(x_SP, weight_PD, gone)[1], rel=1e-6)
    costs = [one.cost for one in rounds]
    assert costs == sorted(costs)
    assert [p for p in range(P) if not removal.left[p]] == sorted(gone)


@pytest.mark.parametrize("step", [1, 2])
def test_classes_lose_equally_many(step: int) -> None:
    """12 units in 3 classes; the second is all but silent, so that a search without classes would take it away first."""
    x_SP, weight_PD = draw(11)
    x_SP[:, 8:16] *= 1e-2
    free, bound = problem(x_SP, weight_PD, 12), problem(x_SP, weight_PD, 12)
    eliminate(free, 6)
    assert not free.left[4:8].any()
    rounds = eliminate(bound, 6, step=step, classes=3)
    assert bound.left.unflatten(0, (3, 4)).sum(1).tolist() == [2, 2, 2]
    assert [len(one.units) for one in rounds] == [3 * step] * (2 // step)
    gone = inputs_of(sorted(unit for one in rounds for unit in one.units), 12)
    assert rounds[-1].cost == pytest.approx(explicit(x_SP, weight_PD, gone)[1], rel=1e-6)


def test_what_is_given_is_not_changed() -> None:
    x_SP, weight_PD = draw(12)
    gram_PP, metric_DD = x_SP.T @ x_SP, metric("metric")
    before = [tensor.clone() for tensor in (gram_PP, weight_PD, metric_DD)]
    eliminate(Elimination(gram_PP, weight_PD, P, ridge=RIDGE, metric_DD=metric_DD), 4)
    assert all(map(torch.equal, before, (gram_PP, weight_PD, metric_DD)))


def test_moments_are_float32_under_autocast() -> None:
    x_SP = draw(13)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = moment(x_SP.float(), x_SP.float())
    torch.testing.assert_close(found.double(), x_SP.T @ x_SP, rtol=1e-5, atol=1e-4)
    assert moment(x_SP.bfloat16(), x_SP.bfloat16()).dtype == torch.float32
