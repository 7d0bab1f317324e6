"""What is kept after each event, and when a plateau is one."""

from dataclasses import replace
from typing import Any

import pytest

from callbacks.pruning.gradual_pruning import Plateau
from callbacks.pruning.plan import PruningPlan, Sparsities, shape_after, steps_of
from models.pruning.budget.costs import flops, parameters
from models.pruning.budget.schedule import sparsity_after
from models.pruning.budget.target import Budget
from models.pruning.cut import Targets
from models.structure.shape import LayerShape, Shape

DENSE = Shape(hidden=32, head_dim=8, vocabulary=300, layers=(LayerShape(48, 4, 2),) * 4)


def plan(events: int, **settings: Any) -> list[Targets]:
    least = settings.pop("least", None)
    sparsities = {name: settings.pop(name) for name in list(settings) if name.endswith("sparsity")}
    plan = PruningPlan(Sparsities(**sparsities), events, **{"schedule": "linear", "multiple": 8} | settings)
    return plan.targets(DENSE, least)


def test_every_axis_follows_its_own_course() -> None:
    assert plan(2, mlp_sparsity=0.5) == [Targets(neurons=32), Targets(neurons=24)]
    assert plan(2, depth_sparsity=0.5) == [Targets(layers=3), Targets(layers=2)]
    assert plan(2, hidden_sparsity=0.5) == [Targets(hidden=24), Targets(hidden=16)]
    both = plan(2, kv_group_sparsity=0.5, query_head_sparsity=0.5)
    assert both == [Targets(kv_groups=2, query_heads=4), Targets(kv_groups=1, query_heads=1)]
    assert plan(2, mlp_sparsity=0.5, schedule="cubic")[0] == Targets(neurons=24)


def test_averages_over_layers_need_not_be_whole() -> None:
    assert plan(2, kv_group_sparsity=0.5, per_layer=True) == [Targets(kv_groups=1.5), Targets(kv_groups=1.0)]


def test_turns() -> None:
    turns = plan(4, mlp_sparsity=0.5, kv_group_sparsity=0.5, depth_sparsity=0.5, turns=True)
    assert turns == [
        Targets(neurons=32, layers=4),
        Targets(kv_groups=2, layers=3),
        Targets(neurons=24, layers=2),
        Targets(kv_groups=1, layers=2),
    ]


def costs(measure: Any, targets: list[Targets]) -> list[float]:
    """Of the shape after each event, over the dense one's."""
    return [measure(shape_after(DENSE, target)) / measure(DENSE) for target in targets]


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
@pytest.mark.parametrize("axes", [("neurons",), ("kv_groups",), ("neurons", "kv_groups")])
def test_a_budget_is_used_up_and_never_exceeded(axes: tuple[Any, ...], schedule: Any) -> None:
    """At the end to less than a step of the finest axis; and layers never grow again on the way there."""
    one_less = {"neurons": DENSE.evenly({"neurons": 40}), "kv_groups": DENSE.evenly({"kv_groups": 1})}
    step = 1 - parameters(one_less[axes[0]]) / parameters(DENSE)
    for ratio in (0.95, 0.9, 0.85, 0.8):
        if (axes == ("kv_groups",) and ratio < 0.9) or (axes == ("neurons",) and ratio < 0.65):
            continue
        targets = plan(3, budget=Budget("parameters", ratio, axes), schedule=schedule, multiple=8)
        for number, cost in enumerate(costs(parameters, targets), 1):
            limit = 1 - sparsity_after(number, 3, 1 - ratio, schedule)
            assert cost <= limit + 1e-9
        assert ratio - step < costs(parameters, targets)[-1]
        for axis in ("neurons", "kv_groups"):
            kept = [getattr(target, axis) for target in targets]
            assert kept == [None] * 3 if axis not in axes else sorted(kept, reverse=True)


def test_every_event_of_unlike_layers_has_a_limit() -> None:
    budget = Budget("flops", 0.8, length=7)
    first, last = plan(2, budget=budget, per_layer=True, depth_sparsity=0.25)
    dense = flops(DENSE, batch=1, new=7)
    without_a_layer = flops(DENSE.keeping({("layer", 0): 0}), batch=1, new=7)
    assert (first.layers, last.layers) == (4, 3)
    assert first.limit is not None
    assert last.limit is not None
    assert last.limit.axes == ("neurons", "kv_groups")
    assert last.limit.measure(DENSE) == dense
    assert last.limit.most == int(0.8 * dense)
    # Half of what the budget takes beyond the layer, of the student that still has it.
    assert first.limit.most == dense - (without_a_layer - last.limit.most) / 2
    assert (first.neurons, first.kv_groups, last.neurons, last.kv_groups) == (None,) * 4


def test_other_axes_count_towards_a_budget() -> None:
    settings: dict[str, Any] = {"depth_sparsity": 0.25, "query_head_sparsity": 0.5}
    for extra in ({"kv_group_sparsity": 0.5}, {}):
        targets = plan(2, budget=Budget("parameters", 0.55, ("neurons",)), **settings, **extra)
        last = targets[-1]
        assert (last.layers, last.kv_groups) == (3, 1 if extra else None)
        assert last.query_heads == (1 if extra else 2)
        (cost,) = costs(parameters, targets[-1:])
        assert 0.5 < cost <= 0.55
        assert last.neurons is not None
        (above,) = costs(parameters, [replace(last, neurons=last.neurons + 8)])
        assert above > 0.55


def test_a_latency_ends_at_the_sizes_that_were_found() -> None:
    budget = Budget("latency", 0.7)
    assert plan(2, budget=budget) == [Targets()] * 2  # before the search
    found: Any = {"neurons": 16, "kv_groups": 2}
    first, last = plan(2, budget=budget, least=found)
    assert last == Targets(neurons=16, kv_groups=2)
    assert first == Targets(neurons=32, kv_groups=2)
    _, last = plan(2, budget=budget, least=found, per_layer=True)
    assert last.limit is not None
    assert last.limit.most == flops(DENSE.evenly(found), batch=1, new=128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"budget": Budget("parameters", 0.1)},
            "smallest student keeps, found 0.1 where it has 0.470 .* parameters; raise",
        ),
        ({"budget": Budget("flops", 0.3)}, "found 0.3 where it has 0.* of the dense student's flops"),
        (
            {"budget": Budget("parameters", 0.9), "depth_sparsity": 0.5},
            "below what the sparsities leave, found 0.9 where",
        ),
        ({"budget": Budget("parameters", 0.7), "mlp_sparsity": 0.5}, "no GradualPruning.mlp_sparsity with a budget"),
        ({"budget": Budget("latency", 0.7), "kv_group_sparsity": 0.5}, "no GradualPruning.kv_group_sparsity with a"),
        ({"budget": Budget("flops", 0.7), "query_head_sparsity": 0.5}, "no GradualPruning.query_head_sparsity with"),
        ({"budget": Budget("flops", 0.7), "turns": True}, "turns with mlp_sparsity"),
        ({}, "with a sparsity or a budget, found neither"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(2, **settings)


def test_deadlines_are_behind_the_start() -> None:
    assert steps_of(1, 6, 1, "plateau") == [6]
    assert steps_of(1, 10, 3, "plateau") == [4, 7, 10]
    assert steps_of(4, 4, 1, "plateau") == [4]


@pytest.mark.parametrize(
    ("losses", "reached"),
    [
        ([3.0, 3.0], False),
        ([3.0, 3.0, 3.0], False),
        ([3.0, 3.0, 3.0, 3.0], True),
        ([9.0, 1.0, 3.0, 3.0, 3.0, 3.0], True),
        ([4.0, 2.0, 2.0, 3.5], False),
        ([4.0, 2.0, 2.0, 3.6], True),
        ([1.0, 1.0, 2.0, 2.0], True),
    ],
)
def test_plateau(losses: list[float], reached: bool) -> None:
    plateau = Plateau(patience=2, min_delta=0.08)
    for loss in losses:
        plateau.add(loss)
    assert plateau.reached is reached
    resumed = Plateau(patience=2, min_delta=0.08)
    resumed.losses = plateau.losses
    assert resumed.reached is reached
    plateau.losses = []
    assert not plateau.reached
