"""Time of the parts of a training step: a stopwatch per named part, read by `callbacks.Throughput`."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Stopwatch:
    """Seconds spent in named parts and tokens seen since the last `reset`; on a GPU, time spent *launching* the part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens: int | Tensor = 0  # a tensor while training: no device sync before someone reads it

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time spent inside the `with` block to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started

    def reset(self) -> None:
        """Start again from zero."""
        self.seconds.clear()
        self.tokens = 0
