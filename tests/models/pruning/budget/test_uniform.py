"""Layers of the same sizes within a limit, against trying all sizes."""

import itertools
import random
from functools import partial
from typing import Any

import pytest

from models.pruning.budget.costs import Measure, flops, parameters
from models.pruning.budget.uniform import evenly_sparse, largest_within, smallest
from models.structure.shape import LayerShape, Shape, WidthAxis

FLOPS = partial(flops, batch=1, new=128)
SMOLLM2 = Shape(hidden=576, head_dim=64, vocabulary=49152, layers=(LayerShape(1536, 9, 3),) * 30)
SMALL = Shape(hidden=32, head_dim=8, vocabulary=300, layers=(LayerShape(50, 8, 4),) * 3)
BOTH: tuple[WidthAxis, ...] = ("neurons", "kv_groups")


def fit(shape: Shape, axes: tuple[WidthAxis, ...], measure: Measure, most: float, multiple: int) -> dict[Any, int]:
    least = smallest(shape, axes, multiple=multiple)
    return dict(largest_within(shape, axes, measure, most, multiple=multiple, least=least))


def size(shape: Shape, pair: tuple[int, int]) -> int:
    return parameters(shape.evenly(dict(zip(BOTH, pair, strict=True))))


@pytest.mark.parametrize(
    ("shape", "multiple", "measure"),
    [(SMOLLM2, 64, parameters), (SMOLLM2, 64, FLOPS), (SMALL, 16, parameters), (SMALL, 1, parameters)],
)
def test_both_axes_come_within_a_step_of_neurons_of_the_limit(shape: Shape, multiple: int, measure: Measure) -> None:
    whole = measure(shape)
    lowest = measure(shape.evenly(smallest(shape, BOTH, multiple=multiple)))
    step = measure(shape.evenly({"neurons": 2 * multiple})) - measure(shape.evenly({"neurons": multiple}))
    draw = random.Random(0)
    for most in [lowest, whole, *(draw.uniform(lowest, whole) for _ in range(40))]:
        sizes = fit(shape, BOTH, measure, most, multiple)
        cost = measure(shape.evenly(sizes))
        assert cost <= most
        assert most - cost < step
        assert sizes["neurons"] % multiple == 0 or sizes["neurons"] == shape.layers[0].neurons


def test_shares_are_as_alike_as_whole_groups_allow() -> None:
    """Of all sizes within a step of the limit, tried one by one, none is more even."""
    multiple = 16
    shape = SMALL.evenly({"neurons": 48})
    sizes = {pair: size(shape, pair) for pair in itertools.product([48, 32, 16], [4, 3, 2, 1])}
    step = sizes[48, 4] - sizes[32, 4]
    for most in sizes.values():
        kept = fit(shape, BOTH, parameters, most, multiple)
        close = [abs(neurons / 48 - groups / 4) for (neurons, groups), cost in sizes.items() if 0 <= most - cost < step]
        assert abs(kept["neurons"] / 48 - kept["kv_groups"] / 4) == pytest.approx(min(close))


def test_where_neurons_cannot_fill_a_group_the_closest_is_taken() -> None:
    """In a shape that is mostly attention there are gaps that no sizes fill."""
    pairs = list(itertools.product([50, 48, 32, 16], [4, 3, 2, 1]))
    costs = [FLOPS(SMALL.evenly(dict(zip(BOTH, pair, strict=True)))) for pair in pairs]
    gaps = [(low, high) for low, high in itertools.pairwise(sorted(costs)) if high - low > FLOPS(SMALL) * 0.05]
    assert gaps
    for low, high in gaps:
        assert FLOPS(SMALL.evenly(fit(SMALL, BOTH, FLOPS, (low + high) / 2, 16))) == low


def test_smollm2_at_some_ratios() -> None:
    kept = [fit(SMOLLM2, BOTH, parameters, ratio * parameters(SMOLLM2), 64) for ratio in (0.9, 0.8, 0.7, 0.5)]
    assert [(sizes["neurons"], sizes["kv_groups"]) for sizes in kept] == [(1216, 3), (1152, 2), (896, 2), (576, 1)]


def test_one_axis_alone() -> None:
    half = 0.8 * parameters(SMOLLM2)
    assert fit(SMOLLM2, ("neurons",), parameters, half, 64).keys() == {"neurons"}
    assert fit(SMOLLM2, ("kv_groups",), parameters, 0.9 * parameters(SMOLLM2), 64) == {"kv_groups": 1}
    assert fit(SMOLLM2, ("kv_groups",), parameters, 0.95 * parameters(SMOLLM2), 64) == {"kv_groups": 2}


def test_what_is_kept_at_least_stays() -> None:
    most = parameters(SMOLLM2.evenly({"neurons": 960, "kv_groups": 3}))
    assert fit(SMOLLM2, BOTH, parameters, most, 64)["kv_groups"] < 3
    least: dict[WidthAxis, int] = {"neurons": 64, "kv_groups": 3}
    assert largest_within(SMOLLM2, BOTH, parameters, most, multiple=64, least=least) == {"neurons": 960, "kv_groups": 3}


def test_a_limit_below_the_smallest_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a limit that the smallest layers keep, found 100 where they leave"):
        fit(SMALL, BOTH, parameters, 100, 16)


def test_sparsity_goes_evenly_from_everything_to_the_least() -> None:
    assert evenly_sparse(SMOLLM2, 0.0, measure=FLOPS, multiple=64) == SMOLLM2
    assert set(evenly_sparse(SMOLLM2, 1.0, measure=FLOPS, multiple=64).layers) == {LayerShape(64, 3, 1)}
    shapes = [evenly_sparse(SMOLLM2, share / 10, measure=FLOPS, multiple=64) for share in range(11)]
    removed = [(FLOPS(SMOLLM2) - FLOPS(shape)) / (FLOPS(SMOLLM2) - FLOPS(shapes[-1])) for shape in shapes]
    assert removed == pytest.approx([share / 10 for share in range(11)], abs=0.04)
    neurons_alone = evenly_sparse(SMOLLM2, 1.0, ["neurons"], measure=FLOPS, multiple=64)
    assert set(neurons_alone.layers) == {LayerShape(64, 9, 3)}
