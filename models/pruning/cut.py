"""From target sizes to edits: units are ranked, sizes are shared out over the layers, edits name what stays.  Then the repair."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Literal

from transformers import PreTrainedModel

from models.architecture import DecoderLayer, decoder_layers
from models.forward import Batch
from models.pruning.allocation import Curve, allocate
from models.pruning.curvature import collect_curvature
from models.pruning.depth import block_influence, layers_to_drop
from models.pruning.importance import ImportanceScores, Total, identity
from models.pruning.least_squares import Removal
from models.pruning.ranking import OsscarRanking, Ranking, ScoreRanking
from models.pruning.repair import repair
from models.pruning.scores import SCORES, top_indices
from models.pruning.shape import Axis, Shape, shape_of
from models.structure import Edit

ScoreName = Literal["osscar", "activation", "taylor", "wanda", "magnitude", "random"]
Repair = Literal["none", "layerwise", "sequential"]
Allocation = Literal["uniform", "per_layer"]


@dataclass(frozen=True)
class Targets:
    """What is kept after an event; None leaves an axis alone.

    Attributes:
        neurons: In every layer; on average over the layers where the allocation is `per_layer`.
        query_heads: The same, all groups together.
        kv_groups: The same.
        layers: Decoder layers.
        hidden: Channels of the residual stream.

    Raises:
        ValueError: A target leaves nothing.
    """

    neurons: int | None = None
    query_heads: int | None = None
    kv_groups: int | float | None = None
    layers: int | None = None
    hidden: int | None = None

    def __post_init__(self) -> None:
        for axis, size in asdict(self).items():
            if size is not None and size < 1:
                raise ValueError(f"expected targets of 1 or more, found {size} {axis}; leave something of every axis")


@dataclass(frozen=True)
class PruningSettings:
    """How units are chosen, and what is made good afterwards.

    Args:
        score: What ranks neurons, heads and groups: osscar (what removing them costs after the best repair, second order),
            activation (Minitron), taylor, wanda, magnitude or random.
        repair: Fit o_proj and down_proj of all layers anew after a cut: sequential (on the cut model's own inputs), layerwise (on
            the dense model's), or none.
        allocation: The same sizes in every layer (uniform), or where they cost least (per_layer; such a student is no plain
            Hugging Face model).
        multiple: Neurons kept in a layer are a multiple of this where sizes differ by layer.
        damping: Share of the mean diagonal that damps OSSCAR's statistics.
        ridge: Share of the mean diagonal that pulls a repair towards the weights before it.
        seed: Of random choices.
    """

    score: ScoreName = "osscar"
    repair: Repair = "sequential"
    allocation: Allocation = "uniform"
    multiple: int = 64
    damping: float = 0.01
    ridge: float = 0.3
    seed: int = 0


def plan_cut(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    targets: Targets,
    settings: PruningSettings,
    *,
    total: Total = identity,
) -> list[Edit]:
    """The edits that bring a model to its targets; the model is not changed.

    Depth goes by block influence.  The hidden size goes by the score, and by taylor in the place of osscar, since no single
    projection reads the residual stream.

    Args:
        model: The model to cut.
        batches: Calibration batches with answers; with several processes, those of this one.
        targets: What is kept.
        settings: How units are chosen.
        total: Sums a tensor over all processes.

    Raises:
        ValueError: There was no batch, the target of query heads is no multiple of the groups, or an average cannot be reached.
    """
    layers = decoder_layers(model)
    gone: list[int] = []
    if targets.layers is not None and targets.layers < len(layers):
        gone = layers_to_drop(block_influence(model, batches, total=total), len(layers) - targets.layers)
    layers = [layer for layer in layers if layer.index not in gone]

    def scores(name: str) -> ImportanceScores:
        return SCORES[name](model, batches, total=total, seed=settings.seed)

    edits: list[Edit] = []
    if any(size is not None for size in (targets.neurons, targets.kv_groups, targets.query_heads)):
        ranking: Ranking
        if settings.score == "osscar":
            curvature = collect_curvature(model, batches, seed=settings.seed, total=total)
            ranking = OsscarRanking(curvature, settings.damping)
        else:
            ranking = ScoreRanking(scores(settings.score))
        edits += _narrow_layers(shape_of(model), layers, ranking, targets, settings)
    if gone:
        edits.append({"op": "drop_layers", "layers": gone})
    if targets.hidden is not None and targets.hidden < model.config.hidden_size:
        by_channel = scores("taylor" if settings.score == "osscar" else settings.score).hidden
        edits.append({"op": "narrow_hidden", "keep": top_indices(by_channel, targets.hidden)})
    return edits


def repair_cut(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    edits: Sequence[Edit],
    batches: Sequence[Batch],
    settings: PruningSettings,
    *,
    total: Total = identity,
) -> None:
    """After the edits: new weights for `o_proj` and `down_proj` of `model`, so that it follows `dense`; see `models.pruning.repair`."""
    if settings.repair != "none":
        repair(model, dense, edits, batches, prefix=settings.repair, ridge=settings.ridge, total=total)


def _narrow_layers(
    shape: Shape, layers: Sequence[DecoderLayer], ranking: Ranking, targets: Targets, settings: PruningSettings
) -> list[Edit]:
    per_layer = settings.allocation == "per_layer"
    edits: list[Edit] = []
    if targets.neurons is not None:
        least = settings.multiple if per_layer else targets.neurons
        step = settings.multiple if per_layer else _STEP
        rounds = [ranking.neurons(layer, min(least, layer.num_neurons), step) for layer in layers]
        kept = _kept(shape, "neurons", layers, rounds, targets.neurons if per_layer else None)
        edits += _edits("narrow_mlp", shape, "neurons", layers, kept)
    groups = [list(range(layer.num_kv_groups)) for layer in layers]
    if targets.kv_groups is not None:
        rounds = [ranking.kv_groups(layer, 1 if per_layer else int(targets.kv_groups)) for layer in layers]
        groups = _kept(shape, "kv_groups", layers, rounds, targets.kv_groups if per_layer else None)
        edits += _edits("narrow_kv_groups", shape, "kv_groups", layers, groups)
    if targets.query_heads is not None:
        each = _heads_of_a_group(targets.query_heads, targets.kv_groups or fmean(len(kept) for kept in groups))
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


_STEP = 32  # neurons removed between two scorings; on SmolLM2 steps of 10 and of 64 choose equally well


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
