"""A budget in measured time: the student that takes a given share of the dense model's seconds, on the backend that runs it.

Time does not follow from counts: small matrices, the head, attention and what the backend fuses all have their own speed.  So
students of candidate shapes are timed next to the dense model.  A run of one and a run of the other take turns, every pair gives one
ratio, and the median of the pairs counts, so that a change of the machine's load meets both.

How a shape becomes something to time is the caller's choice: `torch_run` here, `onnx_run` in `export/sessions/timed_prefill.py`, or any other.

Legend: B prompts, T tokens.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from models.hardware.interleave import interleave
from models.structure.shape import Shape

Run = Callable[[], Any]


@dataclass(frozen=True)
class Latency:
    """Median seconds of both models, and the ratio of the student's to the dense one's over pairs: median and quartiles."""

    dense_s: float
    student_s: float
    ratio: float
    spread: tuple[float, float]


@dataclass(frozen=True)
class Met:
    """A shape that meets a budget of time, and the sparsity asked of `shrink` to get it.

    `latency` was measured once more after the search, which found the ratios in `searched`, by sparsity, in order.
    """

    shape: Shape
    sparsity: float
    latency: Latency
    searched: dict[float, float]


def compare(dense: Run, student: Run, *, repetitions: int) -> Latency:
    """Time two forward passes in turns: `repetitions` rounds, two or more, after one that does not count."""
    seconds = interleave({"dense": dense, "student": student}, repetitions=repetitions)
    ratios = [ours / theirs for ours, theirs in zip(seconds["student"], seconds["dense"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Latency(statistics.median(seconds["dense"]), statistics.median(seconds["student"]), middle, (low, high))


def meet_latency(
    dense: Shape,
    shrink: Callable[[float], Shape],
    ratio: float,
    *,
    prepare: Callable[[Shape], Run],
    on_measured: Callable[[Shape, Latency], None] = lambda shape, latency: None,
    tolerance: float = 0.1,
    repetitions: int = 15,
    attempts: int = 8,
) -> Met:
    """Find a shape whose measured time is `ratio` of the dense model's.

    The search goes where a straight line between the nearest measurements on either side points, or to their middle, until a ratio
    is within a quarter of the tolerance or no new shape lies between.  The closest one is then measured afresh, and only that counts.

    Args:
        dense: What the ratio is to.
        shrink: A sparsity from 0 (nothing more is removed) to 1 (the least that may be left) to a shape; larger ones give faster
            shapes.
        ratio: Time of the student over time of the dense model, below 1.
        prepare: Builds what runs a shape once.
        on_measured: Is told of every measurement.
        tolerance: Largest relative difference between measured and asked ratio.
        repetitions: Counted rounds of each measurement; of the last one twice as many.
        attempts: Shapes to measure at most.

    Raises:
        ValueError: The smallest student is too slow, or the closest shape is too far from the ratio.
    """
    if not 0 < ratio < 1:
        raise ValueError(
            f"expected a ratio to the dense model's time between 0 and 1, found {ratio:g}; choose one, such as 0.8"
        )
    dense_run = prepare(dense)

    def measured(sparsity: float, rounds: int = repetitions) -> Latency:
        shape = shrink(sparsity)
        latency = compare(dense_run, prepare(shape), repetitions=rounds)
        on_measured(shape, latency)
        return latency

    def distance(found: float) -> float:
        return abs(found / ratio - 1)

    searched = {1.0: measured(1.0).ratio}
    if searched[1.0] > ratio * (1 + tolerance):
        raise ValueError(
            f"expected a ratio that the smallest student reaches, found {ratio:g} where it takes {searched[1.0]:.2f} of the dense "
            "model's time, as embedding, head and the least of every layer stay; choose a higher ratio, or prune more"
        )
    while min(map(distance, searched.values())) > tolerance / 4 and len(searched) < attempts:
        sparsity = _next_sparsity(shrink, {0.0: 1.0} | searched, ratio)
        if sparsity is None:
            break
        searched[sparsity] = measured(sparsity).ratio
    closest = min(searched, key=lambda sparsity: distance(searched[sparsity]))
    latency = measured(closest, 2 * repetitions)
    if distance(latency.ratio) > tolerance:
        raise ValueError(
            f"expected a student within {tolerance:.0%} of the ratio {ratio:g}, found {latency.ratio:.2f} (at first "
            f"{searched[closest]:.2f}) for the closest of {len(searched)}; shrink in smaller steps, or raise repetitions if the "
            "machine is busy"
        )
    return Met(shrink(closest), closest, latency, searched)


def torch_run(model: PreTrainedModel, *, batch: int, length: int) -> Run:
    """The prefill of `batch` prompts of `length` tokens as transformers runs it, with logits at all positions.

    In the model's own type and on its device.
    """
    ids_BT = torch.ones(batch, length, dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def run() -> float:
        return model(input_ids=ids_BT, use_cache=True).logits[-1, -1, 0].item()  # waits for the device

    return run


def _next_sparsity(shrink: Callable[[float], Shape], searched: Mapping[float, float], ratio: float) -> float | None:
    """Between the nearest sparsities on both sides of the ratio; None if there is no shape there that was not measured."""
    slow = max(sparsity for sparsity, found in searched.items() if found > ratio)
    fast = min((sparsity for sparsity, found in searched.items() if found <= ratio and sparsity > slow), default=None)
    if fast is None:
        return None
    share = (searched[slow] - ratio) / (searched[slow] - searched[fast])
    known = {shrink(sparsity) for sparsity in searched}
    choices = [slow + share * (fast - slow), (slow + fast) / 2]
    if len(searched) % 2:  # every second time the middle: lines alone close in slowly on a curve
        choices.reverse()
    return next((sparsity for sparsity in choices if shrink(sparsity) not in known), None)
