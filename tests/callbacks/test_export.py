"""What the export at the end of `fit` takes over from the callbacks of the training."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

import callbacks.export
from callbacks import ExportOnFitEnd, PhaseEvaluation, Preflight, QuantizationAwareTraining
from models.forward import answer_logits
from models.loading.reference import load_model
from models.losses import forward_kl
from models.teacher import Teacher
from tests.helpers.pruning_runs import fit, make_places, pruning


def test_the_report_holds_the_events_of_the_pruning(tmp_path: Path) -> None:
    """The last one with its recovery, which is measured when the training ends."""
    callback = pruning(0.5)
    fit(make_places(tmp_path), tmp_path / "run", callback, ExportOnFitEnd(precision="fp32", formats=["hf"]))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [event["step"] for event in report["pruning"]] == [2, 4]
    assert report["pruning"] == callback.history
    assert "kl_recovered" in report["pruning"][-1]
    assert "## Pruning events" in (tmp_path / "run/report.md").read_text()


def test_the_report_of_a_run_without_pruning(tmp_path: Path) -> None:
    fit(make_places(tmp_path), tmp_path / "run", ExportOnFitEnd(precision="fp32", formats=["hf"]), trainer_max_steps=2)
    assert json.loads((tmp_path / "run/report.json").read_text())["pruning"] == []
    assert "Pruning" not in (tmp_path / "run/report.md").read_text()


def test_labels_that_are_no_tokens_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected every label as one token"):
        fit(
            make_places(tmp_path),
            tmp_path / "run",
            ExportOnFitEnd(precision="fp32", formats=["onnx"], labels=["n", "yes"]),
        )
    assert not (tmp_path / "run/metrics.csv").exists()


def test_training_is_let_go_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, moments and the teacher are gone when the student is written; a teacher that is wanted again comes back."""
    seen: dict[str, object] = {}
    export_all = callbacks.export.export_all

    def everything() -> list[Any]:
        gc.collect()
        return [thing for thing in gc.get_objects() if isinstance(thing, Teacher | torch.optim.Optimizer)]

    of_other_tests = {id(thing): thing for thing in everything()}

    def look(student: PreTrainedModel, *arguments: Any, **settings: Any) -> dict[str, Any]:
        ours = [thing for thing in everything() if id(thing) not in of_other_tests]
        seen["teachers"] = sum(isinstance(thing, Teacher) for thing in ours)
        seen["moments"] = sum(len(thing.state) for thing in ours if isinstance(thing, torch.optim.Optimizer))
        seen["gradients"] = sum(parameter.grad is not None for parameter in student.parameters())
        return export_all(student, *arguments, **settings)

    monkeypatch.setattr(callbacks.export, "export_all", look)
    export = ExportOnFitEnd(precision="fp32", formats=["hf"])
    trainer = fit(make_places(tmp_path), tmp_path / "run", pruning(0.5), PhaseEvaluation(0, "val"), export)
    assert seen == {"teachers": 0, "moments": 0, "gradients": 0}
    trainer.validate_loop.verbose = False
    trainer.limit_val_batches = 1.0
    assert trainer.validate(trainer.lightning_module, trainer.datamodule)[0]["val/kl"] > 0


def test_graphs_are_judged_as_they_are_served(tmp_path: Path) -> None:
    places, run = make_places(tmp_path), tmp_path / "run"
    export = ExportOnFitEnd(
        precision="fp32", formats=["hf", "onnx"], compare_with_teacher=True, served_questions=5, benchmark_prompt=16
    )
    trainer = fit(places, run, export, trainer_max_steps=2)
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"served_questions": 5},
            "expected ExportOnFitEnd.served_questions together with compare_with_teacher and a graph",
        ),
        ({"served_questions": -1}, "expected ExportOnFitEnd.served_questions between 0 and"),
        ({"cpu_batches": 0}, "expected ExportOnFitEnd.cpu_batches between 1 and"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportOnFitEnd(precision="fp32", **settings)


@pytest.mark.parametrize("further", [{"labels": ["n", "y"]}, {"prefill": True}, {"cpu": True}])
def test_further_graphs_want_a_graph(further: dict) -> None:
    with pytest.raises(ValueError, match=f"expected onnx or engine among formats for {next(iter(further))}"):
        ExportOnFitEnd(precision="fp32", formats=["hf"], **further)


class Stop(Callback):
    """The end of a preflight that found nothing."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise RuntimeError("the preflight let it pass")


def preflight(
    folder: Path, export: ExportOnFitEnd, quantization: QuantizationAwareTraining, sparsity: float = 0.5
) -> None:
    fit(make_places(folder), folder / "run", pruning(sparsity), quantization, export, Preflight(), Stop())


def test_before_training_one_line_says_that_the_package_for_compressed_folders_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quantization = QuantizationAwareTraining(5, 1)
    with pytest.raises(RuntimeError, match="let it pass"), caplog.at_level("INFO"):
        preflight(tmp_path / "installed", ExportOnFitEnd(precision="fp8", formats=["hf"]), quantization)
    assert "compressed" not in caplog.text
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(RuntimeError, match="let it pass"), caplog.at_level("INFO"):
        preflight(tmp_path / "left out", ExportOnFitEnd(precision="fp8", formats=["hf"]), quantization)
    (line,) = [line for line in caplog.messages if "compressed" in line]
    assert line.startswith("compressed/ is left out: ") and line.endswith("run `pip install -e '.[serving]'`")
    with pytest.raises(ModuleNotFoundError, match="expected the package compressed-tensors"):
        preflight(tmp_path / "asked", ExportOnFitEnd(precision="fp8", formats=["hf"], compressed=True), quantization)


def test_too_few_questions_to_judge_what_is_served_are_refused_before_training(tmp_path: Path) -> None:
    export = ExportOnFitEnd(precision="fp8", formats=["onnx"], compare_with_teacher=True, served_questions=3)
    with pytest.raises(ValueError, match="answer tokens or more to judge what is served, found .* in 3 questions"):
        preflight(tmp_path, export, QuantizationAwareTraining(5, 1))


def test_a_compressed_folder_that_cannot_be_is_refused_before_training(tmp_path: Path) -> None:
    """32 of 48 neurons are left: a whole group of 32, not of 64."""
    asked = ExportOnFitEnd(precision="int8_g64", formats=["hf"], compressed=True)
    with pytest.raises(ValueError, match=r"whole groups of 64 weights .* found 32 inputs in .*q_proj"):
        preflight(tmp_path / "groups", asked, QuantizationAwareTraining(5, 1, "int8_g64"))
    mixed = QuantizationAwareTraining(5, 1, "int8_g32", exceptions={"*.down_proj": "int4_g64"})
    with pytest.raises(ValueError, match=r"whole groups of 64 weights .* found 24 inputs in .*down_proj"):
        preflight(tmp_path / "mixed", ExportOnFitEnd(precision="mixed", formats=["hf"], compressed=True), mixed)
    places = make_places(tmp_path / "unequal")
    with pytest.raises(ValueError, match=r"allocation uniform for ExportOnFitEnd.compressed"):
        fit(places, tmp_path / "run", pruning(0.5, allocation="per_layer"), QuantizationAwareTraining(5, 1), asked)
    with pytest.raises(
        ValueError, match=r"QuantizationAwareTraining among trainer.callbacks for ExportOnFitEnd.compressed"
    ):
        fit(
            make_places(tmp_path / "plain"),
            tmp_path / "run",
            ExportOnFitEnd(precision="fp32", formats=["hf"], compressed=True),
        )


def test_a_student_trained_with_quantizers_is_saved_quantized_too(tmp_path: Path) -> None:
    fit(
        make_places(tmp_path),
        tmp_path / "run",
        QuantizationAwareTraining(3, 1),
        ExportOnFitEnd(precision="fp8", formats=["hf"]),
    )
    paths = [row["path"] for row in json.loads((tmp_path / "run/report.json").read_text())["artefacts"]]
    assert paths == ["student", "compressed"]
    config = json.loads((tmp_path / "run/compressed/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors" and config["dtype"] == "bfloat16"
