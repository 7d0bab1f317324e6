"""Which neurons, key/value groups and query heads each layer keeps: units are ranked, sizes are shared out, edits name what stays."""

from collections.abc import Callable, Sequence
from statistics import fmean

from models.architecture import DecoderLayer
from models.pruning.allocation import Curve, allocate
from models.pruning.least_squares import Removal
from models.pruning.ranking import Ranking
from models.pruning.shape import Axis, Shape
from models.structure import Edit

_STEP = 32  # neurons removed between two scorings where all layers keep as many


def narrow_layers(
    shape: Shape,
    layers: Sequence[DecoderLayer],
    ranking: Ranking,
    *,
    neurons: int | None = None,
    kv_groups: float | None = None,
    query_heads: int | None = None,
    multiple: int | None = None,
) -> list[Edit]:
    """Edits that bring layers to their targets.

    Args:
        shape: The model's.
        layers: Those that stay.
        ranking: Of their units.
        neurons: Kept in every layer, or on average over the layers; None leaves them all.
        kv_groups: The same.
        query_heads: The same, all groups together.
        multiple: Sizes may differ by layer, those of the MLP in multiples of this; None: all layers get the same.

    Raises:
        ValueError: Groups are no whole number, query heads no multiple of the groups, or an average cannot be reached.
    """
    edits: list[Edit] = []
    if neurons is not None:
        step, least = (multiple, multiple) if multiple else (_STEP, neurons)
        rounds = [ranking.neurons(layer, min(least, layer.num_neurons), step) for layer in layers]
        kept = _kept(shape, "neurons", layers, rounds, neurons if multiple else None)
        edits += _edits("narrow_mlp", shape, "neurons", layers, kept)
    groups = [list(range(layer.num_kv_groups)) for layer in layers]
    if kv_groups is not None:
        if not multiple and kv_groups != int(kv_groups):
            raise ValueError(
                f"expected a whole number of key/value groups where every layer keeps as many, found {kv_groups:g}; round it, or "
                "allocate per layer"
            )
        rounds = [ranking.kv_groups(layer, 1 if multiple else int(kv_groups)) for layer in layers]
        groups = _kept(shape, "kv_groups", layers, rounds, kv_groups if multiple else None)
        edits += _edits("narrow_kv_groups", shape, "kv_groups", layers, groups)
    if query_heads is not None:
        each = _heads_of_a_group(query_heads, kv_groups or fmean(len(kept) for kept in groups))
        for layer, kept_groups in zip(layers, groups, strict=True):
            if each * layer.num_kv_groups < layer.num_query_heads:
                heads = ranking.query_heads(layer, kept_groups, each)
                edits.append({"op": "narrow_query_heads", "layer": layer.index, "keep": heads})
    return edits


def _heads_of_a_group(query_heads: int, kv_groups: float) -> int:
    each = round(query_heads / kv_groups)
    if abs(each * kv_groups - query_heads) > 0.5:  # an average of groups may be no whole number
        raise ValueError(
            f"expected a target of query heads that leaves as many in each of {kv_groups:g} key/value groups, found "
            f"{query_heads}; make it a multiple of the groups"
        )
    return each


def _kept(
    shape: Shape,
    axis: Axis,
    layers: Sequence[DecoderLayer],
    rounds: Sequence[Sequence[Removal]],
    average: float | None,
) -> list[list[int]]:
    """The units that stay in each layer: after all its rounds, or after so many that the average is reached at least cost."""
    counts = [len(of_layer) for of_layer in rounds]
    if average is not None:
        curves = {}
        for layer, of_layer in zip(layers, rounds, strict=True):
            left = [shape.units((axis, layer.index))]
            for removal in of_layer:
                left.append(left[-1] - len(removal.units))
            curves[axis, layer.index] = Curve(left, [0.0, *(removal.cost for removal in of_layer)])
        units = allocate(
            shape, curves, _total_units(axis), average * len(layers) + _units_of_others(shape, axis, layers)
        )
        counts = [list(curves[axis, layer.index].kept).index(units[axis, layer.index]) for layer in layers]
    kept = []
    for layer, of_layer, count in zip(layers, rounds, counts, strict=True):
        removed = {unit for removal in of_layer[:count] for unit in removal.units}
        kept.append([unit for unit in range(shape.units((axis, layer.index))) if unit not in removed])
    return kept


def _total_units(axis: Axis) -> Callable[[Shape], float]:
    return lambda shape: sum(getattr(layer, axis) for layer in shape.layers)


def _units_of_others(shape: Shape, axis: Axis, layers: Sequence[DecoderLayer]) -> int:
    """Units in layers that are dropped anyway."""
    return int(_total_units(axis)(shape)) - sum(shape.units((axis, layer.index)) for layer in layers)


def _edits(op: str, shape: Shape, axis: Axis, layers: Sequence[DecoderLayer], kept: Sequence[list[int]]) -> list[Edit]:
    return [
        {"op": op, "layer": layer.index, "keep": units}
        for layer, units in zip(layers, kept, strict=True)
        if len(units) < shape.units((axis, layer.index))
    ]
