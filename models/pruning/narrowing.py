"""Chooses the neurons, key/value groups and query heads that each layer keeps: units are ranked, sizes are shared out, edits name what stays."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import get_args

from models.architecture import DecoderLayer
from models.pruning.budget.allocation import Curve, allocate
from models.pruning.budget.costs import Measure
from models.pruning.budget.target import Limit
from models.pruning.scores.osscar import Removal
from models.pruning.scores.removal_order import Ranking
from models.structure.edits import Edit
from models.structure.shape import Key, Shape, WidthAxis, narrow_edit

Rounds = dict[Key, list[Removal]]

_STEP = 64  # neurons removed between two scorings where all layers keep as many


def narrow_layers(
    shape: Shape,
    layers: Sequence[DecoderLayer],
    ranking: Ranking,
    *,
    neurons: int | None = None,
    kv_groups: float | None = None,
    query_heads: int | None = None,
    limit: Limit | None = None,
    multiple: int | None = None,
) -> list[Edit]:
    """Edits that bring layers to their targets.

    Targets are kept in every layer, or on average over the layers; query heads count over all groups; None leaves an
    axis alone.  The shape has the hidden size that the model will have, and the layers are those that stay.  The limit
    is on the model when all is done; its axes have no other target.  With a `multiple` sizes may differ by layer, those
    of the MLP in multiples of it; None: all layers get the same.

    Raises:
        ValueError: Groups are no whole number, query heads no multiple of the groups, an average or the limit cannot be reached, or
            there is a limit where layers must not differ, or on groups whose query heads have a target.
    """
    if limit is not None and (not multiple or (query_heads and "kv_groups" in limit.axes)):
        raise ValueError(
            "expected a limit where sizes may differ by layer, and no target of query heads if it is on their groups, found "
            f"axes {list(limit.axes)}, multiple {multiple} and {query_heads} query heads; allocate per layer, or leave out the heads"
        )
    staying = {layer.index for layer in layers}
    dropped: dict[Key, int] = {("layer", index): 0 for index in range(len(shape.layers)) if index not in staying}
    rounds: Rounds = {}
    left: dict[Key, int] = {}

    def share_out(of_axes: Rounds, measure: Measure, most: float) -> None:
        rounds.update(of_axes)
        curves = {key: _curve(shape.units(key), removals) for key, removals in of_axes.items()}
        left.update(allocate(shape.keeping(left), curves, lambda part: measure(part.keeping(dropped)), most))

    averages: dict[WidthAxis, float | None] = {"neurons": neurons, "kv_groups": kv_groups}
    for axis, average in averages.items():
        if average is not None and multiple:
            share_out(_rounds(ranking, layers, axis, multiple), _units(axis), average * len(layers))
        elif average is not None:
            rounds |= _rounds(ranking, layers, axis, _STEP, least=_whole(average))
            left |= {(axis, index): min(_whole(average), shape.units((axis, index))) for index in staying}
    if query_heads is not None:
        groups = [left.get(("kv_groups", layer.index), layer.num_kv_groups) for layer in layers]
        each = _heads_of_a_group(query_heads, kv_groups or fmean(groups))
        left |= {("query_heads", layer.index): each * layer.num_kv_groups for layer in layers}
    if limit is not None and multiple:
        of_limit = {axis: _rounds(ranking, layers, axis, multiple) for axis in limit.axes}
        share_out({key: of_axis[key] for of_axis in of_limit.values() for key in of_axis}, limit.measure, limit.most)
    return _edits(shape, layers, ranking, rounds, left)


def _rounds(
    ranking: Ranking, layers: Sequence[DecoderLayer], axis: WidthAxis, step: int, least: int | None = None
) -> Rounds:
    """In which order the units of each layer would go, down to the least; by default one step of neurons, or one group."""
    if axis == "kv_groups":
        return {(axis, layer.index): ranking.kv_groups(layer, least or 1) for layer in layers}
    return {
        (axis, layer.index): ranking.neurons(layer, min(least or step, layer.num_neurons), step) for layer in layers
    }


def _curve(units: int, removals: Sequence[Removal]) -> Curve:
    left = [units]
    for removal in removals:
        left.append(left[-1] - len(removal.units))
    return Curve(left, [0.0, *(removal.cost for removal in removals)])


def _units(axis: WidthAxis) -> Measure:
    return lambda shape: sum(getattr(layer, axis) for layer in shape.layers)


def _whole(units: float) -> int:
    if units != int(units):
        raise ValueError(
            f"expected a whole number of key/value groups where every layer keeps as many, found {units:g}; round it, or allocate "
            "per layer"
        )
    return int(units)


def _heads_of_a_group(query_heads: int, kv_groups: float) -> int:
    each = round(query_heads / kv_groups)
    if abs(each * kv_groups - query_heads) > 0.5:  # an average of groups may be no whole number
        raise ValueError(
            f"expected a target of query heads that leaves as many in each of {kv_groups:g} key/value groups, found "
            f"{query_heads}; make it a multiple of the groups"
        )
    return each


def _edits(
    shape: Shape, layers: Sequence[DecoderLayer], ranking: Ranking, rounds: Rounds, left: Mapping[Key, int]
) -> list[Edit]:
    edits: list[Edit] = []
    kept: dict[Key, list[int]] = {}
    for axis in get_args(WidthAxis):
        for layer in layers:
            key: Key = (axis, layer.index)
            total, gone = shape.units(key), set[int]()
            for removal in rounds.get(key, []):
                if total - len(gone) > left[key]:
                    gone.update(removal.units)
            kept[key] = [unit for unit in range(total) if unit not in gone]
            if gone:
                edits.append(narrow_edit(axis, layer.index, kept[key]))
    for layer in layers:
        heads = left.get(("query_heads", layer.index), layer.num_query_heads)
        if heads < layer.num_query_heads:
            keep = ranking.query_heads(layer, kept["kv_groups", layer.index], heads // layer.num_kv_groups)
            edits.append(narrow_edit("query_heads", layer.index, keep))
    return edits
