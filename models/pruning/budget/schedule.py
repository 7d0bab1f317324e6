"""Pruning schedules: pure functions of the step, so that a resumed run needs no counter."""

from typing import Literal

Course = Literal["cubic", "linear"]


def event_steps(start: int, end: int, events: int) -> list[int]:
    """The optimizer steps after which a pruning event takes place, evenly spaced from `start` to `end`, both included."""
    if events == 1:
        return [start]
    return [start + round(i * (end - start) / (events - 1)) for i in range(events)]


def sparsity_after(event: int, events: int, target: float, course: Course) -> float:
    """What is removed, a share of units or a cost, after event number `event` (from 1): `target` at the last one.

    Cubic (Zhu and Gupta, arXiv 1710.01878, eq. 1): target * (1 - (1 - event / events) ** 3), so early events remove most,
    while much is redundant.  Linear: target * event / events.
    """
    progress = event / events
    return target * (1 - (1 - progress) ** 3) if course == "cubic" else target * progress


def units_to_keep(total: int, sparsity: float, multiple: int) -> int:
    """Units kept of `total` after removing the share `sparsity`, rounded to the nearest multiple, at most `total`.

    The result may be 0; the caller decides whether that is an error.
    """
    return min(total, round(total * (1 - sparsity) / multiple) * multiple)
