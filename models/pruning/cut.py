"""From target sizes to edits, and the repair of what is left: the axes of a cut together."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from transformers import PreTrainedModel

from models.architecture import decoder_layers
from models.forward import Batch
from models.pruning.curvature import collect_curvature
from models.pruning.depth import block_influence, layers_to_drop, removal_loss, search_block
from models.pruning.importance import Total, identity
from models.pruning.narrowing import narrow_layers
from models.pruning.ranking import OsscarRanking, Ranking, ScoreRanking
from models.pruning.repair import repair
from models.pruning.scores import SCORES, top_indices
from models.pruning.shape import shape_of
from models.structure import Edit

ScoreName = Literal["osscar", "activation", "taylor", "wanda", "magnitude", "random"]
Repair = Literal["none", "layerwise", "sequential"]
Allocation = Literal["uniform", "per_layer"]
Depth = Literal["block_influence", "search"]


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
        depth: Layers go where they turn the residual stream least (block_influence), or as the one contiguous block without which
            the cross-entropy of the calibration answers is lowest (search).
        seed: Of random choices.
    """

    score: ScoreName = "osscar"
    repair: Repair = "sequential"
    allocation: Allocation = "uniform"
    depth: Depth = "block_influence"
    multiple: int = 64
    damping: float = 0.01
    ridge: float = 0.3
    seed: int = 0


def rank_units(
    model: PreTrainedModel, batches: Sequence[Batch], settings: PruningSettings, *, total: Total = identity
) -> Ranking:
    """Collect what the score needs: one ranking serves all cuts of the same model.

    Raises:
        ValueError: There was no batch.
    """
    if settings.score == "osscar":
        return OsscarRanking(collect_curvature(model, batches, seed=settings.seed, total=total), settings.damping)
    return ScoreRanking(SCORES[settings.score](model, batches, total=total, seed=settings.seed))


def plan_cut(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    targets: Targets,
    settings: PruningSettings,
    *,
    ranking: Ranking | None = None,
    total: Total = identity,
) -> list[Edit]:
    """The edits that bring a model to its targets; the model is not changed.

    The hidden size goes by the score, and by taylor in the place of osscar, since no single projection reads the residual stream.

    Args:
        model: The model to cut.
        batches: Calibration batches with answers; with several processes, those of this one.
        targets: What is kept.
        settings: How units are chosen.
        ranking: From `rank_units`, of this model on these batches; by default it is made where it is needed.
        total: Sums a tensor over all processes.

    Raises:
        ValueError: There was no batch, the target of query heads is no multiple of the groups, or an average cannot be reached.
    """
    layers = decoder_layers(model)
    gone: list[int] = []
    if targets.layers is not None and targets.layers < len(layers):
        gone = _layers_to_drop(model, batches, len(layers) - targets.layers, settings.depth, total)
    edits: list[Edit] = []
    if any(size is not None for size in (targets.neurons, targets.kv_groups, targets.query_heads)):
        edits += narrow_layers(
            shape_of(model),
            [layer for layer in layers if layer.index not in gone],
            ranking or rank_units(model, batches, settings, total=total),
            neurons=targets.neurons,
            kv_groups=targets.kv_groups,
            query_heads=targets.query_heads,
            multiple=settings.multiple if settings.allocation == "per_layer" else None,
        )
    if gone:
        edits.append({"op": "drop_layers", "layers": gone})
    if targets.hidden is not None and targets.hidden < model.config.hidden_size:
        score = SCORES["taylor" if settings.score == "osscar" else settings.score]
        by_channel = score(model, batches, total=total, seed=settings.seed).hidden
        edits.append({"op": "narrow_hidden", "keep": top_indices(by_channel, targets.hidden)})
    return edits


def _layers_to_drop(
    model: PreTrainedModel, batches: Sequence[Batch], count: int, depth: Depth, total: Total
) -> list[int]:
    if depth == "search":
        return search_block(
            len(decoder_layers(model)), count, lambda block: removal_loss(model, batches, block, total=total)
        )
    return layers_to_drop(block_influence(model, batches, total=total), count)


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
