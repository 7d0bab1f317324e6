"""Timing several things fairly on a machine that does other things as well."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from program.progress import Bar

PAUSE = 0.1  # seconds; threads of ONNX Runtime look for more work, on a core of their own, for 50 ms after the last


def interleave(sides: Mapping[str, Callable[[], Any]], *, repetitions: int) -> dict[str, list[float]]:
    """Time every side in turns, so that a change of the machine's load meets all of them, each after a pause of `PAUSE`.

    Args:
        sides: What to time, by name.
        repetitions: Counted repetitions; one more before them is not counted.

    Returns:
        Seconds of each counted repetition, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in Bar(range(repetitions + 1), desc=" / ".join(sides), unit="rounds", leave=False):
        for name, run in sides.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            run()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return seconds
