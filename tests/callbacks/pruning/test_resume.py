"""Whenever a run with pruning stops, going on from its last checkpoint gives the same bits as never stopping."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from callbacks import GradualPruning, PhaseEvaluation
from models.architecture import decoder_layers
from tests.helpers.pruning_runs import STEPS, Save, fit, make_places, pruning
from tests.helpers.same import assert_same

RUNS: dict[str, Callable[[], GradualPruning]] = {
    "mlp and groups": lambda: pruning(0.5, 0.5),
    "heads in turns": lambda: pruning(0.5, query_head_sparsity=0.5, turns=True, repair="none"),
    "depth": lambda: pruning(depth_sparsity=0.5),
    "hidden": lambda: pruning(hidden_sparsity=0.5),
    "plateau": lambda: pruning(0.5, when="plateau", start_step=1, end_step=6, patience=1, min_delta=0.5),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_places(tmp_path_factory.mktemp("places"))


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that a resumed run must share with one that was never stopped."""
    module: Any = trainer.lightning_module
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return {
        "weights": dict(module.state_dict()),
        "edits": module.edits,
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "history": next(c.history for c in callbacks if isinstance(c, GradualPruning)),
        "phases": [c.phases for c in callbacks if isinstance(c, PhaseEvaluation)],
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_resume_around_every_event_equals_the_uninterrupted_run(
    name: str, places: dict[str, str], tmp_path: Path
) -> None:
    def phases() -> list[PhaseEvaluation]:
        return [PhaseEvaluation(generate_tokens=0, split="val")] if name == "mlp and groups" else []

    whole = fit(places, tmp_path, Save(tmp_path, "before"), RUNS[name](), *phases(), Save(tmp_path, "after"))
    expected = state_of(whole)
    steps = [event["step"] for event in expected["history"]]
    assert len(set(steps)) == 2
    assert 1 <= min(steps) < max(steps) < STEPS
    if name == "plateau":
        assert steps == [2, 4]  # of the latest 4 and 6
    for moment in ("before", "after"):
        for step in steps:
            checkpoint = torch.load(tmp_path / f"{moment}-{step}.ckpt", weights_only=True)
            done = steps.index(step) + (moment == "after")
            assert len(checkpoint["callbacks"]["GradualPruning"]["history"]) == done
            resumed = fit(places, tmp_path, RUNS[name](), *phases(), resume=f"{moment}-{step}.ckpt")
            assert_same(state_of(resumed), expected)


def test_averages_follow_and_resume(places: dict[str, str], tmp_path: Path) -> None:
    def run(*more: Save, **settings: Any) -> dict[str, Any]:
        averaged = pruning(0.5, 0.5, hidden_sparsity=0.25), EMAWeightAveraging(decay=0.7)
        trainer = fit(places, tmp_path, *averaged, *more, **settings)
        module: Any = trainer.lightning_module
        layers = decoder_layers(module.student)
        assert {(layer.num_neurons, layer.num_kv_groups) for layer in layers} == {(24, 1)}
        assert module.student.config.hidden_size == 24
        return state_of(trainer)

    expected = run(Save(tmp_path, "last"))
    for step in (1, 2, 3, 4):
        assert_same(run(resume=f"last-{step}.ckpt"), expected)


def test_a_crash_in_the_middle_of_an_event_leaves_what_was_before(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = state_of(fit(places, tmp_path, pruning(0.5)))

    def crash(*_: Any, **__: Any) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr("callbacks.pruning.event.repair_cut", crash)
        with pytest.raises(RuntimeError, match="in the middle"):
            fit(places, tmp_path, pruning(0.5), Save(tmp_path, "last"))
    assert_same(state_of(fit(places, tmp_path, pruning(0.5), resume="last-1.ckpt")), expected)
