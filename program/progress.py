"""Progress of long work: on a terminal a bar that redraws; in a log a line when it ends, and one now and then while it lasts."""

import os
import sys
from typing import Any, ClassVar
from weakref import WeakSet

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines of a log
LAYOUT = "{desc}: |{bar:20}| {n_fmt}/{total_fmt} {elapsed}, about {remaining} left{postfix}"
ENDED = LAYOUT.replace(", about {remaining} left", "")


class Bar(tqdm):
    """tqdm in one layout everywhere, and in plain lines where standard error is no terminal; shown by one process only.

    Takes the arguments of tqdm; a `unit` is a plural. `leave=False` takes a bar off the terminal when it ends; a log keeps its line.
    The time of a bar that runs inside another one (a pruning between two steps) is its own: the other one's estimate leaves it out.
    """

    _running: ClassVar["WeakSet[Bar]"] = WeakSet()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.redraws = sys.stderr.isatty()
        if not self.redraws:
            # Without `leave`, tqdm's last call of `display` has an empty message, and tqdm writes nothing itself.
            kwargs |= {"leave": False, "mininterval": EVERY, "miniters": 1}
        hidden = os.environ.get("LOCAL_RANK", "0") != "0"
        defaults: dict[str, Any] = {"bar_format": LAYOUT, "smoothing": 0.1, "disable": hidden}
        super().__init__(*args, **defaults | kwargs)
        if not self.disable:
            self._running.add(self)

    def close(self) -> None:
        """End."""
        if self in self._running:
            self._running.discard(self)
            took = self._time() - self.start_t  # type: ignore[attr-defined]
            for other in self._running:
                other.start_t += took
                other.last_print_t += took
        super().close()

    @property
    def is_due(self) -> bool:
        """Whether an update would be seen now: time to read figures off a device for `set_postfix`."""
        return not self.disable and self._time() - self.last_print_t >= self.mininterval  # type: ignore[attr-defined]

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]
        """Redraw, or write a line."""
        if self.redraws:
            if self.n == self.total:
                self.bar_format = ENDED
            return bool(super().display(msg, pos))
        ended = msg == ""
        if self.n > self.initial and (ended or self.n != self.total):  # at the end once, not also for the last update
            print(self._line(ended=ended), file=self.fp, flush=True)
        return False

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Make room on a terminal; a line of a log stays where it is."""
        if self.redraws:
            super().clear(*args, **kwargs)

    def _line(self, *, ended: bool) -> str:
        state = self.format_dict
        count, total, elapsed, unit = (state[name] for name in ("n", "total", "elapsed", "unit"))
        done = f"{count:,}" if total in (None, count) else f"{count:,} of {total:,}"
        took = self.format_interval(elapsed)
        line = took if ended and total == 1 else f"{done}{'' if unit == 'it' else f' {unit}'} in {took}"
        if not ended and total:
            rate = state["rate"] or (count - state["initial"]) / elapsed
            line += f", about {self.format_interval(round((total - count) / rate))} left"
        return ", ".join(part for part in (f"{state['prefix']}: {line}", state["postfix"]) if part)
