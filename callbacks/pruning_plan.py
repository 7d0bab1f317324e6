"""What is kept after each pruning event: pure functions of the recipe and of the unpruned student's sizes."""

from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from models.architecture import decoder_layers
from models.pruning.cut import Targets
from models.pruning.schedule import Shape, event_steps, sparsity_after, units_to_keep


@dataclass(frozen=True)
class Sparsities:
    """Share removed at the end, 0 to 1 (1 excluded), of each axis."""

    mlp_sparsity: float = 0.0
    kv_group_sparsity: float = 0.0
    query_head_sparsity: float = 0.0
    depth_sparsity: float = 0.0
    hidden_sparsity: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"expected GradualPruning.{field.name} between 0 and 1 (1 excluded), found {value}; "
                    "it is the share to remove, for example 0.375"
                )

    @property
    def attention(self) -> bool:
        """Whether heads are removed, in groups or within them."""
        return self.kv_group_sparsity > 0 or self.query_head_sparsity > 0


@dataclass(frozen=True)
class PruningPlan:
    """The course of a student's sizes.

    Attributes:
        sparsities: Where it ends.
        events: Number of events.
        schedule: Course of every sparsity over the events in which its axis takes part.
        multiple: Neurons and channels kept are rounded to a multiple of this.
        turns: Odd events, counted from 1, cut the MLP, even ones the attention; depth and hidden size take part in all.
        per_layer: Targets are averages over layers, so key/value groups need not be whole.
    """

    sparsities: Sparsities
    events: int
    schedule: Shape = "cubic"
    multiple: int = 64
    turns: bool = False
    per_layer: bool = False

    def __post_init__(self) -> None:
        both = self.sparsities.mlp_sparsity > 0 and self.sparsities.attention
        if self.turns and not (both and self.events > 1):
            raise ValueError(
                "expected GradualPruning.turns with mlp_sparsity, a sparsity of heads and two or more events, found "
                f"{self.sparsities} and {self.events} events; set them, or turns to false"
            )

    def targets(self, model: PreTrainedModel) -> list[Targets]:
        """What the student keeps after each event.

        Args:
            model: The unpruned student.

        Raises:
            ValueError: An axis would be left with nothing.
        """
        return [self._targets(model, number) for number in range(1, self.events + 1)]

    def _targets(self, model: PreTrainedModel, number: int) -> Targets:
        layers = decoder_layers(model)
        layer, mlp = layers[0], number % 2 == 1 or not self.turns
        attention = number % 2 == 0 or not self.turns
        groups = self._kept("kv_group_sparsity", layer.num_kv_groups, number, whole=not self.per_layer)
        each = self._kept("query_head_sparsity", layer.num_query_heads // layer.num_kv_groups, number)
        neurons = self._kept("mlp_sparsity", layer.num_neurons, number, multiple=self.multiple)
        embedding: Any = model.get_input_embeddings()
        return Targets(
            neurons=int(neurons) if mlp and self.sparsities.mlp_sparsity else None,
            kv_groups=groups if attention and self.sparsities.kv_group_sparsity else None,
            query_heads=round(groups * each) if attention and self.sparsities.query_head_sparsity else None,
            layers=int(self._kept("depth_sparsity", len(layers), number)) if self.sparsities.depth_sparsity else None,
            hidden=int(self._kept("hidden_sparsity", embedding.weight.shape[1], number, multiple=self.multiple))
            if self.sparsities.hidden_sparsity
            else None,
        )

    def _kept(self, axis: str, total: int, number: int, *, multiple: int = 1, whole: bool = True) -> int | float:
        target = getattr(self.sparsities, axis)
        if not target:
            return total
        sparsity = sparsity_after(*self._progress(axis, number), target, self.schedule)
        kept = units_to_keep(total, sparsity, multiple) if whole else total * (1 - sparsity)
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


def deadlines(start: int, end: int, events: int) -> list[int]:
    """The steps at which events take place that wait for a plateau in vain: evenly spaced, after `start`, up to `end`."""
    return event_steps(start, end, events + 1)[1:]
