"""Named phases with a progress bar and their times."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from models.hardware.freed_memory import release_memory
from program.progress import Bar


class Phases:
    """Shows one bar a phase, remembers how long each took, and gives back the memory that it has left behind.

    Attributes:
        seconds: Time of each finished phase by its name; of all its parts together.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, steps: int = 1, part: str = "") -> Iterator[Callable[[], None]]:
        """Run a phase of `steps` steps; call what is yielded after each of them (a phase of one step ends by itself).

        `part` is shown behind the name: which part of the work this is.
        """
        start = time.perf_counter()
        with Bar(total=steps, desc=f"{name}{part}", unit="steps") as bar:

            def step() -> None:
                bar.update()

            yield step
            bar.update(steps - bar.n)
            release_memory()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
