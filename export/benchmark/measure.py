"""One measurement of one artefact: a prompt up to its first token, then tokens one by one; any session with a `run` will do.

Letters as in `export/sessions/session.py`.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.sessions.session import Output, Session
from export.sessions.shared_cache import SharedCacheSession


class SharedCache:
    """A graph for CPUs as it is served: one buffer for the cache, the prompt in pieces, only the last token's head."""

    def __init__(self, path: Path, *, length: int, threads: int | None = None) -> None:
        self._session = SharedCacheSession(path, length=length, threads=threads)

    def run(self, input_ids_BT: Tensor, attention_mask_BS: Tensor, cache: Any = None) -> Output:
        """Process T new tokens of one conversation; the cache is the session's own, and starts empty where none is given."""
        if cache is None:
            self._session.reset()
        return Output(self._session.run(input_ids_BT, last_only=True), [self._session], {})


@dataclass(frozen=True)
class Cell:
    """What is measured at a time: `batch` conversations with a prompt of `prompt_tokens` each, `new_tokens` after the first."""

    batch: int
    prompt_tokens: int
    new_tokens: int


def measure(session: Session, cell: Cell) -> tuple[float, float]:
    """Seconds from the prompt to its first token, and seconds for the tokens after it."""
    ids_BT = torch.ones(cell.batch, cell.prompt_tokens, dtype=torch.long)
    start = time.perf_counter()
    output = session.run(ids_BT, ids_BT)
    token_B1 = output.logits[:, -1:].argmax(dim=-1).cpu()  # waits for a GPU
    prompt_done = time.perf_counter()
    for step in range(1, cell.new_tokens + 1):
        mask_BS = torch.ones(cell.batch, cell.prompt_tokens + step, dtype=torch.long)
        output = session.run(token_B1, mask_BS, output.cache)
        token_B1 = output.logits[:, -1:].argmax(dim=-1).cpu()
    return prompt_done - start, time.perf_counter() - prompt_done


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest as `name`, `name_min`, `name_max`."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
