"""Greedy allocation against trying everything, on small random problems."""

import itertools
import random

import pytest

from models.pruning.budget.allocation import Curve, allocate
from models.pruning.budget.costs import parameters
from models.structure.shape import Key, LayerShape, Shape, levels

WEIGHTS = (3.0, 1.0, 2.0)  # seconds, say, of a neuron in each layer
NEURONS = 40
SHAPE = Shape(hidden=8, head_dim=4, vocabulary=50, layers=(LayerShape(NEURONS, 4, 2),) * 3)
KEYS: list[Key] = [("neurons", index) for index in range(3)]


def measure(shape: Shape) -> float:
    return sum(weight * layer.neurons for weight, layer in zip(WEIGHTS, shape.layers, strict=True))


def random_curves(seed: int, *, convex: bool) -> dict[Key, Curve]:
    draw = random.Random(seed)
    kept = levels(NEURONS, 8)
    curves = {}
    for key in KEYS:
        steps = [draw.random() for _ in kept[1:]]
        steps = sorted(steps) if convex else steps
        curves[key] = Curve(kept, [0.0, *itertools.accumulate(steps)])
    return curves


def cost(curves: dict[Key, Curve], kept: dict[Key, int]) -> float:
    return sum(curve.costs[curve.kept.index(kept[key])] for key, curve in curves.items())


def combinations(curves: dict[Key, Curve]) -> list[dict[Key, int]]:
    return [dict(zip(curves, units, strict=True)) for units in itertools.product(*(c.kept for c in curves.values()))]


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_what_is_best_at_some_price_is_found(seed: int, convex: bool) -> None:
    """Of all combinations, one that minimises cost + price * measure is the cheapest that reaches its own measure."""
    curves = random_curves(seed, convex=convex)
    table = [(cost(curves, kept), measure(SHAPE.keeping(kept)), kept) for kept in combinations(curves)]
    for power in range(30):
        price = 0.003 * 1.2**power
        best = min(table, key=lambda row: row[0] + price * row[1])
        assert allocate(SHAPE, curves, measure, best[1]) == best[2]
        # One that needs no more than this stays within its cost.
        assert cost(curves, allocate(SHAPE, curves, measure, best[1] + 1)) <= best[0]


@pytest.mark.parametrize("seed", range(10))
def test_on_convex_curves_nothing_cheaper_saves_as_much(seed: int) -> None:
    curves = random_curves(seed, convex=True)
    table = [(cost(curves, kept), measure(SHAPE.keeping(kept))) for kept in combinations(curves)]
    for target in range(240, 47, -4):
        kept = allocate(SHAPE, curves, measure, target)
        reached = measure(SHAPE.keeping(kept))
        assert target - 8 * max(WEIGHTS) < reached <= target
        assert cost(curves, kept) == pytest.approx(min(price for price, size in table if size <= reached))


@pytest.mark.parametrize("seed", range(10))
def test_uniform_is_the_best_of_equal_numbers(seed: int) -> None:
    curves = random_curves(seed, convex=True)
    equal = [kept for kept in combinations(curves) if len(set(kept.values())) == 1]
    for target in (230.0, 180.0, 100.0, 48.0):
        best = min((k for k in equal if measure(SHAPE.keeping(k)) <= target), key=lambda kept: cost(curves, kept))
        assert allocate(SHAPE, curves, measure, target, uniform=True) == best


def test_a_tighter_budget_removes_more_of_the_same() -> None:
    curves = random_curves(3, convex=False)
    before = dict.fromkeys(KEYS, NEURONS)
    for target in range(240, 47, -4):
        kept = allocate(SHAPE, curves, measure, target)
        assert all(kept[key] <= before[key] for key in KEYS)
        before = kept


def test_a_curve_with_a_flat_end_is_taken_whole() -> None:
    """Greedy along the curve itself would shy away from the dear first step; along its hull it does not."""
    curves = {KEYS[0]: Curve([40, 32, 24], [0.0, 1.0, 1.1]), KEYS[1]: Curve([40, 32, 24], [0.0, 0.3, 0.6])}
    shape = Shape(8, 4, 50, (LayerShape(NEURONS, 4, 2),) * 2)
    kept = allocate(shape, curves, lambda shape: sum(layer.neurons for layer in shape.layers), 48)
    assert kept == {KEYS[0]: 24, KEYS[1]: 24}
    assert allocate(shape, curves, lambda shape: shape.layers[0].neurons, 24) == {KEYS[0]: 24, KEYS[1]: 40}


def test_axes_that_share_weights_still_reach_the_target() -> None:
    """What a group and a query head in it save together is less than the sum; the whole shape is what counts."""
    curves: dict[Key, Curve] = {}
    for index in range(3):
        curves["kv_groups", index] = Curve([2, 1], [0.0, 1.0 + index])
        curves["query_heads", index] = Curve([4, 2], [0.0, 1.5 + index])
        curves["layer", index] = Curve([1, 0], [0.0, 9.0])
    curves["hidden", 0] = Curve([8, 6], [0.0, 2.0])
    whole = parameters(SHAPE)
    for share in (0.95, 0.9, 0.85, 0.6, 0.5):
        kept = allocate(SHAPE, curves, parameters, share * whole)
        assert parameters(SHAPE.keeping(kept)) <= share * whole


def test_nothing_more_is_taken_from_a_layer_that_goes() -> None:
    curves: dict[Key, Curve] = {("layer", 0): Curve([1, 0], [0.0, 0.1]), KEYS[0]: Curve([40, 8], [0.0, 9.0])}
    curves[KEYS[1]] = Curve([40, 8], [0.0, 99.0])
    shape = Shape(8, 4, 50, (LayerShape(NEURONS, 4, 2),) * 2)
    kept = allocate(shape, curves, lambda shape: sum(layer.neurons for layer in shape.layers), 8)
    assert kept == {("layer", 0): 0, KEYS[0]: 40, KEYS[1]: 8}


def test_nothing_to_do() -> None:
    assert allocate(SHAPE, random_curves(0, convex=True), measure, 240) == dict.fromkeys(KEYS, NEURONS)


def test_a_target_out_of_reach_names_what_can_be_reached() -> None:
    with pytest.raises(ValueError, match="expected a target that these curves reach, found 47 .* leaves 48 of 240;"):
        allocate(SHAPE, random_curves(0, convex=True), measure, 47)


def test_curves_of_another_shape_are_refused() -> None:
    curves = {KEYS[0]: Curve([32, 24], [0.0, 1.0])}
    with pytest.raises(ValueError, match=r"the curve of \('neurons', 0\) to start at all 40 units, found 32;"):
        allocate(SHAPE, curves, measure, 100)


def test_uniform_needs_the_same_steps_everywhere() -> None:
    curves = {KEYS[0]: Curve([40, 32], [0.0, 1.0]), KEYS[1]: Curve([40, 24], [0.0, 1.0])}
    with pytest.raises(ValueError, match="expected a uniform allocation over curves with the same numbers of units"):
        allocate(SHAPE, curves, measure, 100, uniform=True)


@pytest.mark.parametrize(
    ("kept", "costs"), [([], []), ([8, 8], [0.0, 1.0]), ([8, 4], [0.0]), ([8, 4], [0.1, 1.0]), ([4, 8], [0.0, 1.0])]
)
def test_malformed_curves_are_refused(kept: list[int], costs: list[float]) -> None:
    with pytest.raises(ValueError, match="expected a curve of descending numbers of units"):
        Curve(kept, costs)
