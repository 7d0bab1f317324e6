"""The interface of all sessions: `OnnxSession`, `EngineSession` on a GPU, and `TorchSession`.

Letters: B batch, T new tokens, P past tokens, S = P + T, G key/value groups, E head width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass
class Output:
    """What one run of a graph returns.

    Attributes:
        logits: (B, T, V), in the graph's own type; empty where a graph returns log-probabilities of labels in their place.
        cache: One (B, G, S, E) value a layer for keys and one for values: key, value, key, value, ...  Codes, in a quantized cache.
        others: Further outputs by name, if any were asked for.
    """

    logits: Tensor
    cache: list[Any]
    others: dict[str, Tensor]


class Session(Protocol):
    """Runs a model token by token."""

    def run(self, input_ids_BT: Tensor, attention_mask_BS: Tensor, cache: Any = None) -> Output:
        """Process T new tokens; the cache is what the previous call returned, None at first.  See `OnnxSession.run`."""
        ...


class SharingSession(Session, Protocol):
    """One whose conversations may begin alike."""

    def repeat(self, cache: list[Any], batch: int) -> list[Any]:
        """The cache of one conversation, for so many conversations."""
        ...


def position_ids(attention_mask_BS: Tensor, num_new: int) -> Tensor:
    """Positions (B, T) of the last `num_new` tokens, counted from each row's first unmasked token."""
    return (attention_mask_BS.cumsum(dim=1) - 1).clamp(min=0)[:, -num_new:]
