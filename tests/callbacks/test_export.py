"""What the export at the end of `fit` takes over from the callbacks of the training."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_runs import fit, make_places, pruning
from transformers import PreTrainedModel

import callbacks.export
from callbacks import ExportOnFitEnd, PhaseEvaluation
from models.forward import answer_logits
from models.losses import forward_kl
from models.pretrained import load_model
from models.teacher import Teacher


def test_the_report_holds_the_events_of_the_pruning(tmp_path: Path) -> None:
    """The last one with its recovery, which is measured when the training ends."""
    callback = pruning(0.5)
    fit(make_places(tmp_path), tmp_path / "run", callback, ExportOnFitEnd("fp32", ["hf"]))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [event["step"] for event in report["pruning"]] == [2, 4]
    assert report["pruning"] == callback.history
    assert "kl_recovered" in report["pruning"][-1]
    assert "## Pruning events" in (tmp_path / "run/report.md").read_text()


def test_the_report_of_a_run_without_pruning(tmp_path: Path) -> None:
    fit(make_places(tmp_path), tmp_path / "run", ExportOnFitEnd("fp32", ["hf"]), trainer_max_steps=1)
    assert json.loads((tmp_path / "run/report.json").read_text())["pruning"] == []
    assert "Pruning" not in (tmp_path / "run/report.md").read_text()


def test_labels_that_are_no_tokens_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected every label as one token"):
        fit(make_places(tmp_path), tmp_path / "run", ExportOnFitEnd("fp32", ["onnx"], labels=["n", "yes"]))
    assert not (tmp_path / "run/metrics.csv").exists()


def test_training_is_let_go_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, moments and the teacher are gone when the student is written; a teacher that is wanted again comes back."""
    seen: dict[str, object] = {}
    export_all = callbacks.export.export_all

    def look(student: PreTrainedModel, *arguments: Any, **settings: Any) -> dict[str, Any]:
        gc.collect()
        everything = [thing for thing in gc.get_objects() if isinstance(thing, Teacher | torch.optim.Optimizer)]
        seen["teachers"] = sum(isinstance(thing, Teacher) for thing in everything)
        seen["moments"] = sum(len(thing.state) for thing in everything if isinstance(thing, torch.optim.Optimizer))
        seen["gradients"] = sum(parameter.grad is not None for parameter in student.parameters())
        return export_all(student, *arguments, **settings)

    monkeypatch.setattr(callbacks.export, "export_all", look)
    export = ExportOnFitEnd("fp32", ["hf"])
    trainer = fit(make_places(tmp_path), tmp_path / "run", pruning(0.5), PhaseEvaluation(0, "val"), export)
    assert seen == {"teachers": 0, "moments": 0, "gradients": 0}
    trainer.validate_loop.verbose = False
    trainer.limit_val_batches = 1.0
    assert trainer.validate(trainer.lightning_module, trainer.datamodule)[0]["val/kl"] > 0


def test_graphs_are_judged_as_they_are_served(tmp_path: Path) -> None:
    places, run = make_places(tmp_path), tmp_path / "run"
    export = ExportOnFitEnd("fp32", ["hf", "onnx"], compare_with_teacher=True, served_questions=5, benchmark_prompt=16)
    trainer = fit(places, run, export, trainer_max_steps=1)
    report = json.loads((run / "report.json").read_text())
    assert [row["name"] for row in report["served"]] == ["teacher", "student"]
    assert [row["questions"] for row in report["served"]] == [5, 5]
    assert report["served"][0]["kl"] == pytest.approx(0, abs=1e-5)
    # The student in torch, on the same conversations, which are the first ones of the split.
    data, student, teacher = trainer.datamodule, load_model(str(run / "student")), load_model(places["teacher"])
    batch = data.collate_fn(data.examples("val")[:5])
    with torch.no_grad():
        kl_N = forward_kl(answer_logits(student, batch), answer_logits(teacher, batch))
    assert report["served"][1]["kl"] == pytest.approx(float(kl_N.mean()), rel=1e-3)
    assert report["benchmark"][0]["prompt_tokens"] == 16
    assert "## Graphs as they are served" in (run / "report.md").read_text()


@pytest.mark.parametrize("settings", [{"served_questions": 5}, {"served_questions": -1}, {"cpu_batches": 0}])
def test_settings_that_say_nothing_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected ExportOnFitEnd.cpu_batches of 1 or more, and served_questions of 0"):
        ExportOnFitEnd("fp32", **settings)


@pytest.mark.parametrize("further", [{"labels": ["n", "y"]}, {"prefill": True}, {"cpu": True}])
def test_further_graphs_want_a_graph(further: dict) -> None:
    with pytest.raises(ValueError, match=f"expected onnx or engine among formats for {next(iter(further))}"):
        ExportOnFitEnd("fp32", ["hf"], **further)
