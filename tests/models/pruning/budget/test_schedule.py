"""When and how much: pure functions of the step."""

import pytest

from models.pruning.budget.schedule import event_steps, sparsity_after, units_to_keep


@pytest.mark.parametrize(
    ("start", "end", "events", "expected"),
    [
        (10, 10, 1, [10]),
        (10, 20, 2, [10, 20]),
        (0, 30, 4, [0, 10, 20, 30]),
        (1, 10, 3, [1, 5, 10]),
        (3, 5, 3, [3, 4, 5]),
    ],
)
def test_events_are_spread_evenly(start: int, end: int, events: int, expected: list[int]) -> None:
    assert event_steps(start, end, events) == expected


@pytest.mark.parametrize("events", range(2, 9))
def test_events_are_distinct_and_include_both_ends(events: int) -> None:
    steps = event_steps(7, 7 + 50, events)
    assert (steps[0], steps[-1], len(set(steps))) == (7, 57, events)
    assert steps == sorted(steps)
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_cubic_takes_most_at_first() -> None:
    # target * (1 - (1 - t)^3) at t = 1/4, 1/2, 3/4, 1
    values = [sparsity_after(event, 4, 0.5, "cubic") for event in (1, 2, 3, 4)]
    assert values == pytest.approx([0.5 * 37 / 64, 0.5 * 7 / 8, 0.5 * 63 / 64, 0.5])


def test_linear_takes_equal_shares() -> None:
    assert [sparsity_after(event, 4, 0.5, "linear") for event in (1, 2, 3, 4)] == [0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize("course", ["cubic", "linear"])
def test_the_only_event_reaches_the_target(course: str) -> None:
    assert sparsity_after(1, 1, 0.375, course) == 0.375  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("total", "sparsity", "multiple", "expected"),
    [
        (1536, 0.375, 64, 960),
        (100, 0.5, 1, 50),
        (100, 0.5, 16, 48),  # 50 lies nearer to 48 than to 64
        (100, 0.42, 16, 64),  # 58 lies nearer to 64
        (100, 0.0, 64, 100),  # never more than there are
        (100, 0.01, 64, 100),
        (9, 0.34, 1, 6),
        (64, 0.9, 64, 0),  # the caller decides
    ],
)
def test_units_to_keep(total: int, sparsity: float, multiple: int, expected: int) -> None:
    assert units_to_keep(total, sparsity, multiple) == expected
