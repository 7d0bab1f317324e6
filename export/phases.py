"""Named phases with a progress bar and their times."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from models.hardware.freed_memory import release_memory
from program.progress import Bar


class Phases:
    """Shows one bar a phase, remembers how long each took, and gives back the memory that it has left behind.

    Attributes:
        seconds: Time of each finished phase by its name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, steps: int = 1) -> Iterator[Callable[[], None]]:
        """Run a phase; call what is yielded after each of its steps (a phase of one step ends by itself)."""
        start = time.perf_counter()
        with Bar(total=steps, desc=name, unit="steps") as bar:

            def step() -> None:
                bar.update()

            yield step
            bar.update(steps - bar.n)
            release_memory()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
