"""Importance: one number for every unit of a model, and the signature that all scores share.

Legend: L layers, M neurons, H query heads, G key/value groups, D hidden.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import decoder_layers

Total = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """The total of a single process."""
    return x


@dataclass(frozen=True)
class ImportanceScores:
    """Scores of all units of a model, float32, never negative; those of query heads count within their group.

    `neurons` are one tensor (M,) per layer, `query_heads` (H,), `kv_groups` (G,); `hidden` (D,) is of the channels of
    the residual stream.
    """

    neurons: list[Tensor]
    query_heads: list[Tensor]
    kv_groups: list[Tensor]
    hidden: Tensor

    @classmethod
    def in_order(cls, scores: Sequence[Tensor], layers: int) -> "ImportanceScores":
        """From the neurons of all layers, then the query heads, then the groups, then scores of the channels, which add up."""
        return cls(
            neurons=list(scores[:layers]),
            query_heads=list(scores[layers : 2 * layers]),
            kv_groups=list(scores[2 * layers : 3 * layers]),
            hidden=torch.stack(list(scores[3 * layers :])).sum(0),
        )


class Score(Protocol):
    """A function that scores the units of a model and leaves the model as it was."""

    def __call__(
        self, model: PreTrainedModel, batches: Iterable[Batch], *, total: Total = ..., seed: int = ...
    ) -> ImportanceScores:
        """Score all units.

        Args:
            model: The model to judge.
            batches: Calibration batches; with several processes, those of this one.
            total: Sums a tensor over all processes, which gives the scores over all their batches.
            seed: Of the random score; the same in all processes.

        Raises:
            ValueError: The model's family is unknown, or there was no batch and the score needs one.
        """


def unit_counts(model: PreTrainedModel) -> list[int]:
    """Neurons of each layer, then query heads, then groups, then the hidden channels: the order of `in_order`."""
    layers = decoder_layers(model)
    return [
        *(layer.num_neurons for layer in layers),
        *(layer.num_query_heads for layer in layers),
        *(layer.num_kv_groups for layer in layers),
        model.config.hidden_size,
    ]
