"""A line of requests before one worker, by a clock that the test moves."""

from types import SimpleNamespace

import pytest

from benchmarks.ranking import load as ranking_load
from benchmarks.ranking.load import Request, Served, draw_arrivals, draw_requests, serve


class Clock:
    """Time that passes when somebody sleeps or works."""

    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ranking_load, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=clock.sleep))
    return clock


def test_who_arrives_while_the_worker_is_busy_waits(clock: Clock) -> None:
    requests = [Request("p", ("a",) * seconds) for seconds in (1, 2, 1, 1)]
    order: list[int] = []

    def score(prefix: str, films: tuple[str, ...]) -> None:
        order.append(len(films))
        clock.sleep(len(films))

    # Works 2..3, 3..5, 5..6; nobody is there until 9; works 9..10.
    served = serve(score, requests, [2.0, 2.5, 3.0, 9.0])
    assert order == [1, 2, 1, 1]
    assert served.responses == pytest.approx([1.0, 2.5, 3.0, 1.0])
    assert (served.busy, served.elapsed) == pytest.approx((5.0, 10.0))
    assert (served.rate, served.utilisation) == pytest.approx((0.4, 0.5))


def test_percentiles() -> None:
    served = Served([float(number) for number in range(101)], 1.0, 1.0)
    assert served.percentiles() == pytest.approx({"p50_s": 50, "p95_s": 95, "p99_s": 99})


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = draw_arrivals(20_000, 4.0, seed=1)
    gaps = [later - earlier for earlier, later in zip([0.0, *arrivals], arrivals, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert min(gaps) > 0
    assert mean == pytest.approx(0.25, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(0.25**2, rel=0.05)
    assert draw_arrivals(5, 4.0, seed=1) == arrivals[:5] != draw_arrivals(5, 4.0, seed=2)


def test_members_come_again_for_different_films() -> None:
    films = [f"film {number}" for number in range(9)]
    requests = draw_requests(["a", "b", "c"], films, 60, films_each=4, seed=0)
    assert {request.prefix for request in requests} == {"a", "b", "c"}
    assert all(len(set(request.films)) == 4 and set(request.films) <= set(films) for request in requests)
    assert len({request.films for request in requests}) > 50
    assert requests == draw_requests(["a", "b", "c"], films, 60, films_each=4, seed=0)
