"""The search for a latency, on a clock that only the runs move; and what is timed."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import models.hardware.interleave
from models.architecture import CACHE
from models.pruning.budget.latency import compare, meet_latency, torch_run
from models.pruning.budget.uniform import evenly_sparse
from models.structure.shape import LayerShape, Shape
from tests.helpers.tiny import tiny_model

DENSE = Shape(hidden=64, head_dim=16, vocabulary=500, layers=(LayerShape(1024, 4, 4),) * 3)


class Machine:
    """A clock, and runs that take the time that a law gives each shape, times the load of the moment."""

    def __init__(self, law: Callable[[Shape], float], load: Callable[[int], float] = lambda run: 1.0) -> None:
        self.law, self.load = law, load
        self.now, self.runs, self.prepared = 0.0, 0, 0

    def prepare(self, shape: Shape) -> Callable[[], None]:
        self.prepared += 1

        def run() -> None:
            self.now += self.law(shape) * self.load(self.runs)
            self.runs += 1

        return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    def make(*args: Callable[..., float]) -> Machine:
        made = Machine(*args)
        monkeypatch.setattr(
            models.hardware.interleave,
            "time",
            SimpleNamespace(perf_counter=lambda: made.now, sleep=lambda seconds: None),
        )
        return made

    return make


def neurons_and_rest(shape: Shape) -> float:
    """A fifth stays whatever is pruned."""
    return 0.2 + 0.8 * sum(layer.neurons for layer in shape.layers) / 3072


def curved(shape: Shape) -> float:
    return 0.1 + 0.9 * (sum(layer.neurons for layer in shape.layers) / 3072) ** 3


def shrink(sparsity: float) -> Shape:
    return evenly_sparse(DENSE, sparsity, ["neurons"], measure=neurons_and_rest, multiple=16)


def shrink_coarsely(sparsity: float) -> Shape:
    """Times of 1.0, 0.6 and 0.2, nothing between."""
    neurons = round((1 - sparsity) * 2) * 512 or 1
    return DENSE.keeping({("neurons", index): neurons for index in range(3)})


@pytest.mark.parametrize("law", [neurons_and_rest, curved])
@pytest.mark.parametrize("ratio", [0.95, 0.8, 0.5, 0.25])
def test_the_ratio_is_met(machine: Callable[..., Machine], law: Callable[[Shape], float], ratio: float) -> None:
    clock = machine(law)
    met = meet_latency(DENSE, shrink, ratio, prepare=clock.prepare)
    assert law(met.shape) == pytest.approx(ratio, rel=0.1 / 4)
    assert met.shape == shrink(met.sparsity)
    assert met.latency.dense_s == pytest.approx(1.0)
    assert met.latency.student_s == pytest.approx(law(met.shape))
    assert (met.latency.ratio, *met.latency.spread) == pytest.approx((law(met.shape),) * 3)
    assert clock.prepared == len(met.searched) + 2 <= 8


def test_a_load_that_comes_and_goes_meets_both_sides(machine: Callable[..., Machine]) -> None:
    """Ten times slower for hundreds of runs, single runs three times slower."""

    def load(run: int) -> float:
        return (10.0 if run // 150 % 2 else 1.0) * (3.0 if run % 7 == 0 else 1.0)

    met = meet_latency(DENSE, shrink, 0.6, prepare=machine(neurons_and_rest, load).prepare)
    assert neurons_and_rest(met.shape) == pytest.approx(0.6, rel=0.1 / 4)


def test_a_ratio_below_what_stays_names_the_lowest(machine: Callable[..., Machine]) -> None:
    with pytest.raises(
        ValueError, match=r"smallest student reaches, found 0\.15 where it takes 0\.21 of .*; choose a higher"
    ):
        meet_latency(DENSE, shrink, 0.15, prepare=machine(neurons_and_rest).prepare)


def test_the_smallest_student_will_do_if_it_is_close(machine: Callable[..., Machine]) -> None:
    met = meet_latency(DENSE, shrink, 0.2, prepare=machine(neurons_and_rest).prepare)
    assert met.sparsity == 1.0
    assert met.latency.ratio == pytest.approx(0.2125)


def test_shapes_too_far_apart_are_an_error(machine: Callable[..., Machine]) -> None:
    with pytest.raises(
        ValueError, match=r"within 10% of the ratio 0\.45, found 0\.60 .* closest of 2; shrink in smaller"
    ):
        meet_latency(DENSE, shrink_coarsely, 0.45, prepare=machine(neurons_and_rest).prepare)


def test_a_coarse_shape_within_the_tolerance_is_met(machine: Callable[..., Machine]) -> None:
    met = meet_latency(DENSE, shrink_coarsely, 0.57, prepare=machine(neurons_and_rest).prepare)
    assert met.latency.ratio == pytest.approx(0.6)


def test_a_last_measurement_that_disagrees_is_an_error(machine: Callable[..., Machine]) -> None:
    """A student that is fast while it is searched for and slow afterwards."""
    seconds = itertools.chain([0.5], itertools.repeat(0.7))
    clock = machine(lambda shape: 1.0)

    def prepare(shape: Shape) -> Callable[[], None]:
        took = 1.0 if shape == DENSE else next(seconds)
        return lambda: setattr(clock, "now", clock.now + took)

    with pytest.raises(ValueError, match=r"ratio 0\.5, found 0\.70 \(at first 0\.50\) .* raise repetitions"):
        meet_latency(DENSE, shrink, 0.5, prepare=prepare)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5])
def test_only_ratios_between_0_and_1(ratio: float) -> None:
    with pytest.raises(ValueError, match="expected a ratio to the dense model's time between 0 and 1"):
        meet_latency(DENSE, shrink, ratio, prepare=lambda shape: lambda: None)


def test_medians_and_quartiles_of_pairs(machine: Callable[..., Machine]) -> None:
    clock = machine(neurons_and_rest)
    took = itertools.chain(*[(1.0, ratio) for ratio in (9.0, 0.1, 0.2, 0.3, 0.4, 0.5)])  # the first pair does not count

    def run() -> None:
        clock.now += next(took)

    latency = compare(run, run, repetitions=5)
    assert (latency.dense_s, latency.student_s, latency.ratio) == pytest.approx((1.0, 0.3, 0.3))
    assert latency.spread == pytest.approx((0.2, 0.4))


def test_a_torch_run_is_a_whole_prefill() -> None:
    model = tiny_model()
    seen = []
    model.register_forward_hook(lambda _, args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True)
    run = torch_run(model, batch=2, length=5)
    run()
    ((kwargs, output),) = seen
    assert kwargs["input_ids"].shape == (2, 5)
    assert output.logits.shape == (2, 5, 300)
    assert output[CACHE].get_seq_length() == 5
    assert run() == output.logits[-1, -1, 0].item()
    assert not torch.is_inference_mode_enabled()
