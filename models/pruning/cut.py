"""Plans a cut over all axes as edits, and repairs the remaining weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Literal

from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import decoder_layers
from models.pruning.budget.target import Limit
from models.pruning.depth import block_influence, layers_to_drop, removal_loss, search_block
from models.pruning.narrowing import narrow_layers
from models.pruning.repair import repair
from models.pruning.scores.curvature import collect_curvature
from models.pruning.scores.first_order import SCORES, top_indices
from models.pruning.scores.importance import Total, identity
from models.pruning.scores.removal_order import OsscarRanking, Ranking, ScoreRanking
from models.structure.edits import Edit
from models.structure.shape import Key, Shape, shape_of
from program.ranges import Between, Count, Positive, check_fields

ScoreName = Literal["osscar", "activation", "taylor", "wanda", "magnitude", "random"]
Repair = Literal["none", "layerwise", "sequential"]
Allocation = Literal["uniform", "per_layer"]
Depth = Literal["block_influence", "search"]


_SIZE = Between(1, 1e9, advice="leave something of every axis")
Size = Annotated[int, _SIZE]


@dataclass(frozen=True)
class Targets:
    """What is kept after an event; None leaves an axis alone.

    Attributes:
        neurons: In every layer; on average over the layers where the allocation is `per_layer`.
        query_heads: The same, all groups together.
        kv_groups: The same.
        layers: Decoder layers.
        hidden: Channels of the residual stream.
        limit: What the model may cost when all that is done, where the allocation is `per_layer`.

    Raises:
        ValueError: A target leaves nothing.
    """

    neurons: Size | None = None
    query_heads: Size | None = None
    kv_groups: Annotated[float, _SIZE] | None = None
    layers: Size | None = None
    hidden: Size | None = None
    limit: Limit | None = None

    def __post_init__(self) -> None:
        check_fields(self, "a target of ")

    def met_by(self, shape: Shape, *, on_average: bool) -> bool:
        """Whether no unit of a layer has to go: the largest of a shape's layers, or their average, is small enough."""
        size_of = fmean if on_average else max
        sizes = {"neurons": self.neurons, "query_heads": self.query_heads, "kv_groups": self.kv_groups}
        met = (
            most is None or size_of(getattr(layer, axis) for layer in shape.layers) <= most
            for axis, most in sizes.items()
        )
        return all(met) and (self.limit is None or self.limit.measure(shape) <= self.limit.most)


@dataclass(frozen=True)
class PruningSettings:
    """How units are chosen, and how the remaining weights are repaired.

    Args:
        score: What ranks neurons, heads and groups: osscar (what removing them costs after the best repair, second order),
            activation (Minitron), taylor, wanda, magnitude or random.
        repair: Refit o_proj and down_proj of all layers after a cut: sequential (on the cut model's own inputs), layerwise (on
            the dense model's), or none.
        allocation: The same sizes in every layer (uniform), or where they cost least (per_layer; such a student is no plain
            Hugging Face model).
        multiple: Neurons and channels kept are multiples of this (FP8 matrix units want 16, GPUs like 64 or 128).
        damping: Share of the mean diagonal that damps OSSCAR's statistics.
        ridge: Share of the mean diagonal that pulls a repair towards the weights before it.
        depth: Layers go where they turn the residual stream least (block_influence), or as the one contiguous block without which
            the cross-entropy of the calibration answers is lowest (search).
        swaps: The most swaps of OSSCAR's local search in each layer, after its greedy choice, where all layers keep as many.
        seed: Of the choice of batches, and of the score random.

    Raises:
        ValueError: A setting is out of its range, or a null; there are swaps for another score, or where layers keep unlike numbers.
    """

    score: ScoreName = "osscar"
    repair: Repair = "sequential"
    allocation: Allocation = "uniform"
    depth: Depth = "block_influence"
    multiple: Positive = 64
    damping: Annotated[float, Between(0, 1000)] = 0.01
    ridge: Annotated[float, Between(0, 1000)] = 0.3
    swaps: Count = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.swaps and (self.score != "osscar" or self.allocation == "per_layer"):
            raise ValueError(
                f"expected swaps only with the score osscar and the allocation uniform, found {self.swaps} with {self.score} and "
                f"{self.allocation}; set swaps to 0, or change the others"
            )


def rank_units(
    model: PreTrainedModel, batches: Sequence[Batch], settings: PruningSettings, *, total: Total = identity
) -> Ranking:
    """Collect what the score needs: one ranking serves all cuts of the same model.

    Raises:
        ValueError: There was no batch.
    """
    if settings.score == "osscar":
        curvature = collect_curvature(model, batches, seed=settings.seed, total=total)
        return OsscarRanking(curvature, settings.damping, swaps=settings.swaps)
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

    The ranking is one of `rank_units`, of this model on these batches; by default it is made where it is needed.

    Raises:
        ValueError: There was no batch, the target of query heads is no multiple of the groups, an average or the limit cannot be
            reached, or there is a limit for a uniform allocation.
    """
    layers = decoder_layers(model)
    gone: list[int] = []
    if targets.layers is not None and targets.layers < len(layers):
        count = len(layers) - targets.layers
        if settings.depth == "search":
            gone = search_block(len(layers), count, lambda block: removal_loss(model, batches, block, total=total))
        else:
            gone = layers_to_drop(block_influence(model, batches, total=total), count)
    edits: list[Edit] = []
    hidden: dict[Key, int] = {} if targets.hidden is None else {("hidden", 0): targets.hidden}
    shape, per_layer = shape_of(model).keeping(hidden), settings.allocation == "per_layer"
    if not targets.met_by(shape.keeping({("layer", index): 0 for index in gone}), on_average=per_layer):
        edits += narrow_layers(
            shape,
            [layer for layer in layers if layer.index not in gone],
            ranking or rank_units(model, batches, settings, total=total),
            neurons=targets.neurons,
            kv_groups=targets.kv_groups,
            query_heads=targets.query_heads,
            limit=targets.limit,
            multiple=settings.multiple if per_layer else None,
        )
    if gone:
        edits.append({"op": "drop_layers", "layers": gone})
    if targets.hidden is not None and targets.hidden < model.config.hidden_size:
        score = SCORES["taylor" if settings.score == "osscar" else settings.score]
        by_channel = score(model, batches, total=total, seed=settings.seed).hidden
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
