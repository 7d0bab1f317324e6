"""Steps of the pruning events, and the sizes after each: pure functions of the recipe and of the unpruned student's sizes."""

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from models.pruning.budget.schedule import Course, event_steps, sparsity_after, units_to_keep
from models.pruning.budget.target import Budget, Limit
from models.pruning.budget.uniform import Sizes, largest_within, smallest
from models.pruning.cut import Targets
from models.structure.shape import Key, Shape, WidthAxis
from program.ranges import Between

When = Literal["steps", "plateau"]

SPARSITY_OF: dict[WidthAxis, str] = {"neurons": "mlp_sparsity", "kv_groups": "kv_group_sparsity"}
Sparsity = Annotated[float, Between(0, 1, (1,), "it is the share to remove, for example 0.375")]


@dataclass(frozen=True)
class Sparsities:
    """Share removed at the end, 0 to 1 (1 excluded), of each axis."""

    mlp_sparsity: Sparsity = 0.0
    kv_group_sparsity: Sparsity = 0.0
    query_head_sparsity: Sparsity = 0.0
    depth_sparsity: Sparsity = 0.0
    hidden_sparsity: Sparsity = 0.0

    @property
    def given(self) -> list[str]:
        """Names of those above 0."""
        return [field.name for field in fields(self) if getattr(self, field.name)]


@dataclass(frozen=True)
class PruningPlan:
    """The course of a student's sizes, see `GradualPruning`.

    Raises:
        ValueError: Nothing is to be pruned, a budget and a sparsity are about the same units, or there is nothing to take turns.
    """

    sparsities: Sparsities
    events: int
    schedule: Course = "cubic"
    multiple: int = 64  # neurons and channels kept are rounded to a multiple of this
    turns: bool = False  # odd events, from 1, cut the MLP, even ones the attention; all cut depth and hidden size
    per_layer: bool = False  # targets are averages, so key/value groups need not be whole, and a budget is a limit
    budget: Budget | None = None  # in the end; other axes than the budget's are cut as the sparsities say

    def __post_init__(self) -> None:
        given = self.sparsities.given
        if not given and self.budget is None:
            raise ValueError(
                "expected GradualPruning with a sparsity or a budget, found neither; set one, for example mlp_sparsity: 0.25"
            )
        axes = self.budget.axes if self.budget else ()
        twice = {SPARSITY_OF[axis] for axis in axes} | ({"query_head_sparsity"} if "kv_groups" in axes else set())
        for name in given:
            if name in twice:
                raise ValueError(
                    f"expected no GradualPruning.{name} with a budget whose axes are {', '.join(axes)}, found "
                    f"{getattr(self.sparsities, name)}; leave it to the budget, or take the axis out of budget.axes"
                )
        attention = {"kv_group_sparsity", "query_head_sparsity"} & set(given)
        if self.turns and not (attention and "mlp_sparsity" in given and self.events > 1):
            raise ValueError(
                "expected GradualPruning.turns with mlp_sparsity, a sparsity of heads and two or more events, found "
                f"{self.sparsities} and {self.events} events; set them, or turns to false"
            )

    def targets(self, dense: Shape, least: Sizes | None = None) -> list[Targets]:
        """What the student keeps after each event.

        The cost that a budget removes, of what the sparsities leave, follows the schedule.  Uniform layers keep at
        least what they will at the end.  A latency budget ends at the sizes `least` or their FLOPs, if they are given.

        Raises:
            ValueError: An axis would be left with nothing, or a budget is out of reach.
        """
        targets = [self._targets(dense, number) for number in range(1, self.events + 1)]
        if self.budget is None or (self.budget.cost == "latency" and least is None):
            return targets
        axes, measure = self.budget.axes, self.budget.measure
        shapes = [shape_after(dense, target) for target in targets]
        if least is None:
            least = smallest(dense, axes, multiple=self.multiple)
            most: float = math.floor(self.budget.ratio * measure(dense))  # whole numbers, whose differences are exact
            self._check_budget(dense, shapes[-1], least, most)
        else:
            most = measure(shapes[-1].evenly(least))
        removed = measure(shapes[-1]) - most
        for index in reversed(range(self.events)):
            limit = measure(shapes[index]) - sparsity_after(index + 1, self.events, removed, self.schedule)
            if self.per_layer:
                targets[index] = replace(targets[index], limit=Limit(axes, measure, limit))
            else:
                least = largest_within(shapes[index], axes, measure, limit, multiple=self.multiple, least=least)
                targets[index] = replace(targets[index], **least)  # type: ignore[arg-type]
        return targets

    def _check_budget(self, dense: Shape, last: Shape, least: Sizes, most: float) -> None:
        assert self.budget is not None
        whole, name = self.budget.measure(dense), self.budget.counted
        lowest, highest = self.budget.measure(last.evenly(least)) / whole, self.budget.measure(last) / whole
        if lowest * whole > most:
            raise ValueError(
                f"expected a GradualPruning.budget.ratio that the smallest student keeps, found {self.budget.ratio:g} where it has "
                f"{lowest:.3f} of the dense student's {name}; raise the ratio, or let more axes be pruned"
            )
        if highest * whole <= most:
            raise ValueError(
                f"expected a GradualPruning.budget.ratio below what the sparsities leave, found {self.budget.ratio:g} where that is "
                f"{highest:.3f} of the dense student's {name}; lower the ratio, or leave the budget out"
            )

    def _targets(self, dense: Shape, number: int) -> Targets:
        """What the sparsities leave after an event."""
        layer, given = dense.layers[0], self.sparsities.given
        mlp, attention = number % 2 == 1 or not self.turns, number % 2 == 0 or not self.turns
        groups = self._kept("kv_group_sparsity", layer.kv_groups, number, whole=not self.per_layer)
        each = self._kept("query_head_sparsity", layer.query_heads // layer.kv_groups, number)
        neurons = self._kept("mlp_sparsity", layer.neurons, number, multiple=self.multiple)
        layers = self._kept("depth_sparsity", len(dense.layers), number)
        hidden = self._kept("hidden_sparsity", dense.hidden, number, multiple=self.multiple)
        return Targets(
            neurons=int(neurons) if mlp and "mlp_sparsity" in given else None,
            kv_groups=groups if attention and "kv_group_sparsity" in given else None,
            query_heads=round(groups * each) if attention and "query_head_sparsity" in given else None,
            layers=int(layers) if "depth_sparsity" in given else None,
            hidden=int(hidden) if "hidden_sparsity" in given else None,
        )

    def _kept(self, axis: str, total: int, number: int, *, multiple: int = 1, whole: bool = True) -> int | float:
        target = getattr(self.sparsities, axis)
        if not target:
            return total
        done, events = self._progress(axis, number)
        sparsity = sparsity_after(done, events, target, self.schedule)
        kept = units_to_keep(total, sparsity, multiple) if whole else total * (1 - sparsity)
        if done == events and kept >= total:
            raise ValueError(
                f"expected GradualPruning.{axis} to remove some of {total} units (in multiples of {multiple}), found {target}, which removes "
                "nothing; raise it, or lower multiple"
            )
        if sparsity and kept < 1:
            raise ValueError(
                f"expected GradualPruning.{axis} to leave something of {total} units (in multiples of {multiple}), found "
                f"{target}, which leaves {kept}; lower it"
            )
        return kept

    def _progress(self, axis: str, number: int) -> tuple[int, int]:
        """How many of the axis's events are done after event `number`, and how many there are."""
        if not self.turns or axis in ("depth_sparsity", "hidden_sparsity"):
            return number, self.events
        if axis == "mlp_sparsity":
            return (number + 1) // 2, (self.events + 1) // 2
        return number // 2, self.events // 2


def shape_after(dense: Shape, targets: Targets) -> Shape:
    """The shape that targets leave, layers all alike; averages of groups are rounded up, and a limit is not looked at."""
    kept: dict[Key, int] = {} if targets.hidden is None else {("hidden", 0): targets.hidden}
    for index, layer in enumerate(dense.layers):
        groups = layer.kv_groups if targets.kv_groups is None else math.ceil(targets.kv_groups)
        kept["kv_groups", index] = groups
        if targets.neurons is not None:
            kept["neurons", index] = targets.neurons
        if targets.query_heads is not None:
            each = round(targets.query_heads / (targets.kv_groups or layer.kv_groups))
            kept["query_heads", index] = each * layer.kv_groups
        if targets.layers is not None and index >= targets.layers:
            kept["layer", index] = 0
    return dense.keeping(kept)


def steps_of(start: int, end: int, events: int, when: When) -> list[int]:
    """The optimizer steps after which events take place, at the latest; `ValueError` if not every event has its own."""
    room = end - start + 1 if when == "steps" else max(1, end - start)
    alone = when == "steps" and (events == 1) != (start == end)
    if not 1 <= start <= end or not 1 <= events <= room or alone:
        raise ValueError(
            f"expected 1 <= start_step <= end_step, a step for every event, and with when: steps one event exactly if they are "
            f"equal, found start_step {start}, end_step {end}, events {events}, when {when}; change GradualPruning in the recipe"
        )
    # Events that wait for a plateau in vain are evenly spaced as well, but after `start`.
    return event_steps(start, end, events) if when == "steps" else event_steps(start, end, events + 1)[1:]
