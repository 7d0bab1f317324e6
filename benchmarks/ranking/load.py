"""Response times under load: requests arrive at random moments, and one worker takes them in order.

Requests do not wait for each other's answers: whoever arrives while the worker is busy waits in line, and the waiting counts.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from export.serving.scorer import Scorer
from export.sessions.session import Output, SharingSession


@dataclass(frozen=True)
class Request:
    """Films to rank for a member, whom the prefix describes."""

    prefix: str
    films: tuple[str, ...]


@dataclass(frozen=True)
class Served:
    """What became of requests that were served in order."""

    responses: list[float]  # seconds from arrival to answer, in the order of arrival
    busy: float  # seconds that the worker worked
    elapsed: float  # seconds from the start to the last answer

    @property
    def rate(self) -> float:
        """Requests answered in a second."""
        return len(self.responses) / self.elapsed

    @property
    def utilisation(self) -> float:
        """Share of the time that the worker worked."""
        return self.busy / self.elapsed

    def percentiles(self) -> dict[str, float]:
        """Seconds within which half, 95 % and 99 % of the requests were answered."""
        return {f"p{percent}_s": float(np.percentile(self.responses, percent)) for percent in (50, 95, 99)}


def draw_requests(
    prefixes: Sequence[str], films: Sequence[str], number: int, *, films_each: int, seed: int
) -> list[Request]:
    """Requests of random members, at equal chances, each for different random films."""
    draw = random.Random(seed)
    return [Request(draw.choice(prefixes), tuple(draw.sample(films, films_each))) for _ in range(number)]


def draw_arrivals(number: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which requests arrive: a Poisson process of `rate` a second."""
    draw, moment, arrivals = random.Random(seed), 0.0, []
    for _ in range(number):
        moment += draw.expovariate(rate)
        arrivals.append(moment)
    return arrivals


def serve(score: Callable[[str, Sequence[str]], Any], requests: Sequence[Request], arrivals: Sequence[float]) -> Served:
    """Answer requests in the order of their arrival, none before it has arrived."""
    responses, busy, started = [], 0.0, time.perf_counter()
    bar = tqdm(requests, desc="Load", unit="request", leave=False)
    for request, arrival in zip(bar, arrivals, strict=True):
        time.sleep(max(0.0, started + arrival - time.perf_counter()))
        begun = time.perf_counter()
        score(request.prefix, request.films)
        done = time.perf_counter()
        responses.append(done - started - arrival)
        busy += done - begun
    return Served(responses, busy, done - started)


class PrefixCounter:
    """A session that counts how often a prefix was computed."""

    def __init__(self, session: SharingSession) -> None:
        self.session, self.computed = session, 0

    def run(self, input_ids_BT: Tensor, attention_mask_BS: Tensor, cache: list[Any] | None = None) -> Output:
        """See `OnnxSession.run`."""
        self.computed += cache is None
        return self.session.run(input_ids_BT, attention_mask_BS, cache)

    def repeat(self, cache: list[Any], batch: int) -> list[Any]:
        """See `OnnxSession.repeat`."""
        return self.session.repeat(cache, batch)


def under_load(
    session: SharingSession,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    requests: Sequence[Request],
    load: float,
    *,
    seed: int,
) -> dict[str, Any]:
    """Response times at a share of the capacity, which the first third of the requests measures, one right after the other.

    Rates are requests a second; `hot_share` is that of the requests whose prefix was there.
    """
    counter = PrefixCounter(session)
    scorer = Scorer(counter, tokenizer, labels)
    trial = requests[: -(-len(requests) // 3)]
    for request in trial:
        scorer.score(request.prefix, request.films)  # fills the caches
    capacity = serve(scorer.score, trial, [0.0] * len(trial)).rate
    counter.computed = 0
    served = serve(scorer.score, requests, draw_arrivals(len(requests), load * capacity, seed))
    return {
        "load": load,
        "requests": len(requests),
        "capacity_per_s": capacity,
        "rate_per_s": served.rate,
        "utilisation": served.utilisation,
        "hot_share": 1 - counter.computed / len(requests),
        **served.percentiles(),
        "max_s": max(served.responses),
    }
