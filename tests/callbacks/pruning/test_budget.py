"""Budgets in `fit`: met by what training ends with, searched for once, the same after a resume, refused in one sentence."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import PreTrainedModel

import models.hardware.interleave
import train
from callbacks import GradualPruning
from callbacks.pruning import budget as pruning_budget
from callbacks.pruning.budget import PruningBudget
from export.report import read_metrics
from models.loading.reference import load_model
from models.pruning.budget.costs import flops, parameters
from models.pruning.budget.latency import Run
from models.pruning.budget.target import Budget
from models.pruning.cut import Targets
from models.structure.shape import Shape, shape_of
from tests.helpers.pruning_runs import Save, fit, make_places, pruning
from tests.helpers.same import assert_same


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_places(tmp_path_factory.mktemp("places"))


def student(trainer: Trainer) -> Shape:
    return shape_of(trainer.lightning_module.student)


def dense(places: dict[str, str]) -> Shape:
    return shape_of(load_model(places["student"]))


@pytest.mark.parametrize("axes", [("neurons",), ("neurons", "kv_groups")])
@pytest.mark.parametrize("allocation", ["uniform", "per_layer"])
@pytest.mark.parametrize("budget", [partial(Budget, "parameters", 0.8), partial(Budget, "flops", 0.75, length=40)])
def test_a_counted_budget_is_met(
    budget: Callable[..., Budget], allocation: Any, axes: Any, places: dict[str, str], tmp_path: Path
) -> None:
    """Never exceeded after any event, and at the end one more step of the finest axis would exceed it."""
    asked = budget(axes=axes)
    callback = pruning(budget=asked, allocation=allocation, judge_batches=0)
    shape, whole = student(fit(places, tmp_path, callback)), dense(places)
    measure = parameters if asked.cost == "parameters" else partial(flops, batch=1, new=40)
    name = f"budget_{asked.cost}_ratio"
    first, last = (event[name] for event in callback.history)
    assert last == measure(shape) / measure(whole) <= asked.ratio
    assert last < first <= (1 + asked.ratio) / 2
    layers = range(4)
    if allocation == "uniform":
        assert len(set(shape.layers)) == 1
        more = [shape.keeping({("neurons", index): shape.units(("neurons", index)) + 8 for index in layers})]
    else:
        more = [shape.keeping({("neurons", index): shape.units(("neurons", index)) + 8}) for index in layers]
        more += [shape.keeping({("kv_groups", index): 2}) for index in layers if shape.layers[index].kv_groups == 1]
        assert len(set(shape.layers)) > 1
    assert any(measure(larger) / measure(whole) > asked.ratio for larger in more)
    assert callback.makes_layers_unequal == (allocation == "per_layer")


class Clock:
    """Time that only runs move, by the FLOPs of what they run."""

    def __init__(self) -> None:
        self.now, self.prepared = 0.0, 0

    def prepare(self, model: PreTrainedModel, *, batch: int, length: int) -> Run:
        self.prepared += 1
        seconds = 1 + flops(shape_of(model), batch=batch, new=length) / 1e7
        return lambda: setattr(self, "now", self.now + seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(
        models.hardware.interleave, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=lambda seconds: None)
    )
    monkeypatch.setattr(pruning_budget, "torch_run", clock.prepare)
    return clock


LATENCY = Budget("latency", 0.8, batch=2, length=30)


def state_of(trainer: Trainer) -> dict[str, Any]:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    callback = next(c for c in callbacks if isinstance(c, GradualPruning))
    module: Any = trainer.lightning_module
    return {
        "weights": dict(module.state_dict()),
        "edits": module.edits,
        "optimizer": trainer.optimizers[0].state_dict(),
        "state": callback.state_dict(),
    }


@pytest.mark.parametrize("allocation", ["uniform", "per_layer"])
def test_a_latency_is_searched_for_once_and_a_resume_equals_the_uninterrupted_run(
    allocation: Any, clock: Clock, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> GradualPruning:
        return pruning(budget=LATENCY, allocation=allocation, judge_batches=0)

    whole = fit(places, tmp_path, run(), Save(tmp_path, "after"))
    assert clock.prepared > 2
    expected = state_of(whole)
    found = expected["state"]["latency"]
    assert found["ratio"] == pytest.approx(0.8, rel=0.1)
    shape, first = student(whole), dense(places)
    timed = first.evenly(found["sizes"])
    if allocation == "uniform":
        assert shape == timed
    assert flops(shape, batch=1, new=30) <= flops(timed, batch=1, new=30)

    def searched_again(*_: Any, **__: Any) -> None:
        raise AssertionError("a search in a resumed run")

    monkeypatch.setattr(pruning_budget, "meet_latency", searched_again)
    for step in (1, 2, 3, 4, 5):
        assert torch.load(tmp_path / f"after-{step}.ckpt", weights_only=True)["callbacks"]["GradualPruning"]["latency"]
        assert_same(state_of(fit(places, tmp_path, run(), resume=f"after-{step}.ckpt")), expected)
    other = pruning(budget=Budget("latency", 0.7, batch=2, length=30), allocation=allocation, judge_batches=0)
    with pytest.raises(ValueError, match="the budget for which the checkpoint's sizes were found, .* set it back"):
        fit(places, tmp_path, other, resume="after-3.ckpt")


def test_figures_of_a_latency(
    clock: Clock, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for module in ("callbacks.pruning.budget", "callbacks.pruning.gradual_pruning"):
        monkeypatch.setattr(f"{module}.rank_zero_info", said.append)
    callback = pruning(budget=LATENCY, judge_batches=0)
    fit(places, tmp_path, callback, trainer_logger=CSVLogger(str(tmp_path), name="", version=""))
    ratio = callback.state_dict()["latency"]["ratio"]
    first, last = callback.history
    assert "budget_latency_ratio" not in first
    assert last["budget_latency_ratio"] == ratio
    assert last["budget_flops_ratio"] < first["budget_flops_ratio"] < 1
    logged = read_metrics(tmp_path / "metrics.csv")
    assert logged["pruning/budget_latency_ratio"] == [(0, pytest.approx(ratio)), (4, pytest.approx(ratio))]
    assert [step for step, _ in logged["pruning/budget_flops_ratio"]] == [2, 4]
    assert sum(line.startswith("Searching for 0.8 of the dense") for line in said) == clock.prepared - 1
    assert said[-1].startswith(f"Budget of 0.8 of the time: {ratio:.3f} was measured with")


def test_a_counted_budget_says_what_the_student_costs(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("callbacks.pruning.gradual_pruning.rank_zero_info", said.append)
    shape = student(fit(places, tmp_path, pruning(budget=Budget("parameters", 0.8), judge_batches=0)))
    whole = dense(places)
    share = parameters(shape) / parameters(whole)
    assert said[-1] == (
        f"Budget of 0.8: {parameters(shape):,} of the dense student's {parameters(whole):,} parameters ({share:.4f})"
    )
    assert sum(line.startswith("Budget") for line in said) == 1


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_candidates_really_run_on_the_backend(
    backend: Any, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes of their shapes, in the type that the backend is said to use; only the times are made up."""
    seen: list[tuple[Shape, torch.dtype, bool]] = []
    outputs: list[Any] = []

    def watched(run: Callable[..., Run]) -> Callable[..., Run]:
        def prepare(model: PreTrainedModel, **settings: Any) -> Run:
            seen.append((shape_of(model), model.dtype, model.training))
            return run(model, **settings)

        return prepare

    def compare(dense_run: Run, student_run: Run, *, repetitions: int) -> Any:
        outputs.append((dense_run(), student_run()))
        ratio = parameters(seen[-1][0]) / parameters(seen[0][0])
        return models.pruning.budget.latency.Latency(1.0, ratio, ratio, (ratio, ratio))

    monkeypatch.setattr(pruning_budget, "torch_run", watched(pruning_budget.torch_run))
    monkeypatch.setattr(pruning_budget, "onnx_run", watched(pruning_budget.onnx_run))
    monkeypatch.setattr("models.pruning.budget.latency.compare", compare)
    whole = dense(places)
    least = whole.keeping({("layer", 3): 0}).evenly({"neurons": 8, "kv_groups": 1})  # is measured first, and will do
    budget = Budget("latency", parameters(least) / parameters(whole), length=6, backend=backend)
    callback = pruning(budget=budget, depth_sparsity=0.25, judge_batches=0)
    trainer = fit(places, tmp_path, callback, trainer_precision="bf16-mixed", trainer_max_steps=5)
    assert {dtype for _, dtype, _ in seen} == {torch.bfloat16 if backend == "torch" else torch.float32}
    assert not any(training for *_, training in seen)
    assert trainer.lightning_module.student.dtype == torch.float32
    assert [shape for shape, *_ in seen] == [whole, least, least]
    assert student(trainer) == least
    assert len(outputs) == 2
    if backend == "onnxruntime":
        assert {output.logits.shape for pair in outputs for output in pair} == {(1, 6, 300)}


def test_a_latency_out_of_reach_ends_before_training(clock: Clock, places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a ratio that the smallest student reaches, found 0.1 where"):
        fit(places, tmp_path, pruning(budget=Budget("latency", 0.1)), Save(tmp_path, "none"))
    assert not list(tmp_path.glob("*.ckpt"))


class OtherRank:
    """A trainer of rank 1, and what rank 0 sends it."""

    is_global_zero = False

    def __init__(self, sent: Any) -> None:
        self.strategy = SimpleNamespace(broadcast=lambda own: sent)


def test_rank_0_searches_for_all(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others build nothing, and end with rank 0's sizes or with its error."""
    monkeypatch.setattr(pruning_budget, "meet_latency", None)
    module: Any = SimpleNamespace(student=load_model(places["student"]))
    budget = PruningBudget(LATENCY, 8)
    budget.dense = dense(places)
    error: Any = OtherRank("too slow")
    with pytest.raises(ValueError, match="^too slow$"):
        budget.search(error, module, Targets())
    found: Any = OtherRank({"sizes": {"neurons": 16, "kv_groups": 1}, "ratio": 0.8})
    assert budget.search(found, module, Targets()) == {"neurons": 16, "kv_groups": 1}
    assert budget.measured == {"budget_latency_ratio": 0.8}


def test_a_pruned_student_is_not_searched(clock: Clock, places: dict[str, str], tmp_path: Path) -> None:
    """A checkpoint of a run with sparsities does not say what sizes a latency comes down to."""
    fit(places, tmp_path, pruning(0.5, judge_batches=0), Save(tmp_path, "after"))
    with pytest.raises(ValueError, match="expected the dense student for the search of a latency"):
        fit(places, tmp_path, pruning(budget=LATENCY, judge_batches=0), resume="after-3.ckpt")


def recipe(places: dict[str, str], tmp_path: Path, budget: dict[str, Any]) -> list[str]:
    init = {"budget": budget, "start_step": 1, "end_step": 2, "events": 2, "multiple": 8, "calibration_batches": 1}
    pruned = {"class_path": "GradualPruning", "init_args": init | {"judge_batches": 1}}
    overlay = {
        "trainer": {"max_steps": 3, "callbacks": [pruned], "enable_progress_bar": False, "logger": False},
        "model": {"class_path": "SFT", "init_args": {"student": places["student"], "generate_tokens": 0}},
        "data": {"class_path": "Conversations", "init_args": {"train": places["data"], "batch_size": 3}},
    }
    (tmp_path / "budget.yaml").write_text(yaml.safe_dump(overlay))
    return ["fit", "--config", str(tmp_path / "budget.yaml"), "--run_dir", str(tmp_path / "run")]


def test_a_recipe_names_a_budget(places: dict[str, str], tmp_path: Path) -> None:
    arguments = recipe(places, tmp_path, {"cost": "flops", "ratio": 0.8, "axes": ["neurons"], "length": 12})
    trainer = train.main(arguments).trainer
    measure = partial(flops, batch=1, new=12)
    assert measure(student(trainer)) <= 0.8 * measure(dense(places))
    assert {layer.kv_groups for layer in student(trainer).layers} == {2}
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    (budget,) = [
        callback["init_args"]["budget"]
        for callback in saved["trainer"]["callbacks"]
        if callback["class_path"].endswith("GradualPruning")
    ]
    assert budget == {"cost": "flops", "ratio": 0.8, "axes": ["neurons"], "batch": 1, "length": 12, "backend": "torch"}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"cost": "parameters", "ratio": 1.7}, "budget.ratio between 0 and 1 (both excluded), found 1.7"),
        ({"cost": "flops", "ratio": 0.7, "backend": "onnxruntime"}, "no budget.backend with the cost flops"),
        ({"cost": "parameters", "ratio": 0.1}, "the smallest student keeps, found 0.1 where"),
        ({"cost": "parameters", "ratio": 0.7, "axes": ["hidden"]}, "neurons"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(
    budget: dict[str, Any],
    message: str,
    places: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status = train.entry_point(recipe(places, tmp_path, budget))
    except SystemExit as stop:  # the parser's own refusal
        status = int(stop.code or 0)
    said = capsys.readouterr().err
    assert status == 2
    assert message in said
    assert "expected" in said.lower()
    assert not (tmp_path / "run").exists()
