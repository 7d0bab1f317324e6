"""What is kept after each event, and when a plateau is one."""

from typing import Any

import pytest
from tiny import tiny_model

from callbacks.plateau import Plateau
from callbacks.pruning_plan import PruningPlan, Sparsities, deadlines
from models.pruning.cut import Targets


def plan(events: int, **settings: Any) -> list[Targets]:
    sparsities = {name: settings.pop(name) for name in list(settings) if name.endswith("sparsity")}
    plan = PruningPlan(Sparsities(**sparsities), events, **{"schedule": "linear", "multiple": 8} | settings)
    return plan.targets(tiny_model(num_hidden_layers=4))


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


def test_deadlines_are_behind_the_start() -> None:
    assert deadlines(1, 6, 1) == [6]
    assert deadlines(0, 9, 3) == [3, 6, 9]
    assert deadlines(4, 4, 1) == [4]


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
    plateau.reset()
    assert not plateau.reached
