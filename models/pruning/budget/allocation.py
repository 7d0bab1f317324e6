"""Allocates a budget over the layers at the least cost.

Each key (an axis of a layer, see `models/structure/shape.py`) has a *curve*: what it costs, in nats of KL, to keep fewer and fewer of its
units.  The greedy rule takes next whatever costs least for what it saves.  That is right only where every further unit costs more than
the one before, so the rule walks along the lower convex hull of each curve (Fox, Operations Research 14, 1966): what it has removed
at any corner of a hull cannot be had for less.  Between two corners it stops at the first level that is enough.

What has been removed for one budget is part of what is removed for a tighter one, so gradual events and searches can rely on it.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from models.structure.shape import Key, Shape

_WIDTHS = ("neurons", "query_heads", "kv_groups")


@dataclass(frozen=True)
class Curve:
    """The cost of keeping fewer units.

    Attributes:
        kept: Numbers of units kept, strictly descending from all of them; see `models.structure.shape.levels`.
        costs: The cost of each, in nats; the first is 0.
    """

    kept: Sequence[int]
    costs: Sequence[float]

    def __post_init__(self) -> None:
        descending = all(left > right for left, right in pairwise(self.kept))
        if not self.kept or len(self.kept) != len(self.costs) or not descending or self.costs[0] != 0:
            raise ValueError(
                "expected a curve of descending numbers of units, as many costs, and the first cost 0, found "
                f"{list(self.kept)} with {list(self.costs)}; list all units and cost 0 first"
            )


@dataclass(frozen=True)
class _Stretch:
    """From one corner of a hull to the next: the levels on the way, the last one included."""

    keys: Sequence[Key]
    kept: Sequence[int]
    price: float


def allocate(
    shape: Shape,
    curves: Mapping[Key, Curve],
    measure: Callable[[Shape], float],
    target: float,
    *,
    uniform: bool = False,
) -> dict[Key, int]:
    """Units to keep under each key, so that the shape's measure comes down to the target.

    The price of each step comes from what it alone would save; when to stop comes from the whole shape, so that the target is
    reached also where savings do not add up (query heads in groups that are gone).

    Curves say what may be removed and its cost; all else stays.  The target is the largest `measure` of a shape that is
    allowed: parameters, FLOPs or an estimate of seconds.  Where `uniform`, the same number goes everywhere along
    neurons, query heads and key/value groups.

    Raises:
        ValueError: The target cannot be reached, or curves do not fit the shape or each other.
    """
    kept = {key: curve.kept[0] for key, curve in curves.items()}
    wrong = next((key for key, units in kept.items() if units != shape.units(key)), None)
    if wrong is not None:
        raise ValueError(
            f"expected the curve of {wrong} to start at all {shape.units(wrong)} units, found {kept[wrong]}; "
            "compute the curves again after every cut"
        )
    hulls = [_stretches(shape, keys, _summed(curves, keys), measure) for keys in _together(curves, uniform=uniform)]
    reached = measure(shape)
    for stretch in heapq.merge(*hulls, key=lambda stretch: stretch.price):  # prices rise along each hull
        for level in stretch.kept:
            if reached <= target:
                return kept
            fewer = kept | dict.fromkeys(stretch.keys, level)
            size = measure(shape.keeping(fewer))
            if size < reached:  # it is not, in a layer that is gone
                kept, reached = fewer, size
    if reached > target:
        raise ValueError(
            f"expected a target that these curves reach, found {target:g} where removing all they offer leaves {reached:g} of "
            f"{measure(shape):g}; raise the target, or let the curves go further down"
        )
    return kept


def _together(curves: Mapping[Key, Curve], *, uniform: bool) -> list[list[Key]]:
    """Keys that move together: each alone, or all layers of a width."""
    if not uniform:
        return [[key] for key in curves]
    widths = [[key for key in curves if key[0] == axis] for axis in _WIDTHS]
    return [keys for keys in widths if keys] + [[key] for key in curves if key[0] not in _WIDTHS]


def _summed(curves: Mapping[Key, Curve], keys: Sequence[Key]) -> Curve:
    kept = curves[keys[0]].kept
    other = next((key for key in keys if list(curves[key].kept) != list(kept)), None)
    if other is not None:
        raise ValueError(
            f"expected a uniform allocation over curves with the same numbers of units, found {list(kept)} for {keys[0]} and "
            f"{list(curves[other].kept)} for {other}; allocate per layer, or give all layers the same steps"
        )
    return Curve(kept, [sum(costs) for costs in zip(*(curves[key].costs for key in keys), strict=True)])


def _stretches(shape: Shape, keys: Sequence[Key], curve: Curve, measure: Callable[[Shape], float]) -> list[_Stretch]:
    """The lower convex hull of cost over saving; levels that save no more than the one before are no corners."""
    whole = measure(shape)
    saved = [whole - measure(shape.keeping(dict.fromkeys(keys, level))) for level in curve.kept]

    def price(start: int, end: int) -> float:
        return (curve.costs[end] - curve.costs[start]) / (saved[end] - saved[start])

    corners = [0]
    for end in range(1, len(saved)):
        if saved[end] > saved[corners[-1]]:
            while len(corners) > 1 and price(corners[-1], end) <= price(corners[-2], corners[-1]):
                corners.pop()
            corners.append(end)
    return [_Stretch(keys, curve.kept[start + 1 : end + 1], price(start, end)) for start, end in pairwise(corners)]
