"""Training from captured answers is training from the teacher: the same steps, figures, checkpoints, and clear refusals."""

import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

import train
from callbacks import ExportOnFitEnd, PhaseEvaluation
from datamodules import Conversations
from datamodules.collate import Batch
from export.__main__ import main as export_main
from models import Distillation
from models.forward import answer_hidden
from models.generation.on_policy import OnPolicy
from models.losses import FullTargets, Objective, Targets, head_of, top_k_kl
from models.offline import store
from models.teacher import Teacher
from tests.helpers.chat_doubles import Words
from tests.helpers.distilling import KNOWN, distil
from tests.helpers.tiny import tiny_jsonl
from tests.helpers.training import loader, tiny_trainer

Captured = Callable[..., Path]
STEPS = 10  # more than two epochs of 7 micro-batches, two a step
COMPACT = Objective({"top_k_kl": 1.0, "cross_entropy": 0.1}, top_k=9)


class Rounding(Teacher):
    """Lives, and says what a capture holds: its final hidden states in bfloat16."""

    @torch.no_grad()
    def answer_hidden(self, batch: Batch) -> Tensor:
        return super().answer_hidden(batch).bfloat16().to(self.model.dtype)

    def targets(self, batch: Batch, layers: Iterable[int] = ()) -> tuple[Targets, list[Tensor]]:
        return FullTargets(self.answer_hidden(batch), head_of(self.model)), []


class Record(Callback):
    """The loss of every step, and the samples of every micro-batch; a checkpoint after one step."""

    def __init__(self, save_at: int = 0, path: Path | None = None) -> None:
        self.save_at, self.path = save_at, path
        self.step = 0
        self.losses: dict[int, float] = {}
        self.samples: list[list[int]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.samples.append(batch["index"])
        if trainer.global_step == self.step:
            return  # in the middle of an accumulation
        self.step = trainer.global_step
        self.losses[self.step] = float(trainer.callback_metrics["train/loss"])
        if self.step == self.save_at:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def build(student_folder: str) -> Callable[..., Distillation]:
    return partial(distil, student_folder)


def fit(
    module: Distillation, folder: Path, ckpt_path: Path | None = None, data: Words | None = None, **record: Any
) -> tuple[Record, dict[str, float]]:
    recorded = Record(**record)
    trainer = tiny_trainer(
        folder, STEPS, accumulate_grad_batches=2, callbacks=[recorded], check_val_every_n_epoch=1, logger=False
    )
    trainer.fit(module, data or Words(module.student_reference, batch_size=8, seed=3), ckpt_path=ckpt_path)
    return recorded, {name: float(value) for name, value in trainer.callback_metrics.items()}


# Equal to a live teacher ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [Objective(), Objective({"jsd": 0.7, "cross_entropy": 0.3}, temperature=2.0)],
    ids=lambda objective: "+".join(objective.weights),
)
def test_training_equals_that_of_a_live_teacher_rounded_to_bfloat16(
    objective: Objective, build: Any, captured: Captured, teacher_folder: str, tmp_path: Path
) -> None:
    """In float64: the capture's batches are others, and float32's last bits, which depend on them, can tip a rounding."""
    module = build(f"offline:{captured(dtype=torch.float64)}", objective=objective)
    found, figures = fit(module, tmp_path)
    live = build(teacher_folder, objective=objective)
    live.configure_model()
    live.teacher = Rounding(teacher_folder, dtype=torch.float64)
    expected, their_figures = fit(live, tmp_path)
    assert found.samples == expected.samples and found.samples[:7] != found.samples[7:14], "another order each epoch"
    losses, their_losses = (torch.tensor([r.losses[step] for step in range(1, STEPS + 1)]) for r in (found, expected))
    torch.testing.assert_close(losses, their_losses, rtol=1e-6, atol=0)
    assert float(losses[-1]) < float(losses[0])
    for name, tensor in live.student.state_dict().items():
        torch.testing.assert_close(module.student.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
    assert {"val/kl", "val/top1_agreement", "val/perplexity"} <= figures.keys()
    assert figures == pytest.approx(their_figures, rel=1e-5)


def test_autocast_does_not_reach_the_captured_teacher(build: Any, captured: Captured, tmp_path: Path) -> None:
    """Its figures are those of its own precision, as a live teacher's are."""
    reference = f"offline:{captured()}"
    data = Words(build(reference).student_reference, batch_size=8, seed=3)
    figures = [
        tiny_trainer(tmp_path, precision=precision).validate(build(reference), data, verbose=False)[0]
        for precision in ("32-true", "bf16-mixed")
    ]
    assert figures[0]["val/teacher_perplexity"] == figures[1]["val/teacher_perplexity"]
    assert figures[0]["val/perplexity"] != figures[1]["val/perplexity"]


# The compact form ----------------------------------------------------------------------------------------------------


def test_the_compact_form_trains_and_is_judged_by_what_it_knows(
    build: Any, captured: Captured, tmp_path: Path, teacher_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = build(f"offline:{captured(form='top_k', top_k=9)}", objective=COMPACT)
    with caplog.at_level("INFO"):
        recorded, figures = fit(module, tmp_path)
    assert "The teacher's own figures" not in caplog.text
    assert recorded.losses[STEPS] < recorded.losses[1]
    assert {name for name in figures if name.startswith("val/")} == {"val/perplexity", "val/top_k_kl"}
    assert {"train/top_k_kl_dataset", "train/cross_entropy_dataset"} <= figures.keys()

    data = Words(module.student_reference, batch_size=8, seed=3)
    (judged,) = tiny_trainer(tmp_path).validate(module, data, verbose=False)
    teacher, values = Teacher(teacher_folder, dtype=torch.float32), []
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits_NV = head_of(module.student).logits(answer_hidden(module.student, batch), KNOWN)
        values.append(top_k_kl(logits_NV, teacher.answer_logits(batch)[:, :KNOWN], top_k=9))
    assert judged["val/top_k_kl"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective(top_k=9), "expected top_k_kl or cross_entropy with a teacher's stored top k, found forward_kl; it"),
        (Objective({"top_k_kl": 1.0}, 2.0, top_k=9), "expected temperature 1 with a teacher's stored top k, found 2.0"),
        (
            Objective({"top_k_kl": 1.0}, top_k=10),
            "expected at least objective.top_k = 10 stored tokens, found 9; lower",
        ),
        (Objective({"cross_entropy": 1.0}), "expected at least objective.top_k = 64 stored tokens, found 9; lower it"),
    ],
    ids=["another loss", "temperature", "more tokens", "validation's"],
)
def test_what_the_compact_form_does_not_know_is_refused_before_training(
    objective: Objective, message: str, build: Any, captured: Captured, data: Words, tmp_path: Path
) -> None:
    module = build(f"offline:{captured(form='top_k', top_k=9)}", objective=objective)
    started = Record()
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, callbacks=[started]).fit(module, data)
    assert not started.samples and not hasattr(module, "teacher")


def test_a_student_of_any_objective_is_validated_by_the_compact_form(
    build: Any, captured: Captured, data: Words, tmp_path: Path
) -> None:
    module = build(f"offline:{captured(form='top_k', top_k=9)}", objective=Objective(top_k=9))
    (figures,) = tiny_trainer(tmp_path).validate(module, data, verbose=False)
    assert figures.keys() == {"val/perplexity", "val/top_k_kl"}


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("on_policy.start", {"on_policy": OnPolicy(start=0)}),
        ("hidden_state_layers", {"hidden_state_weight": 1.0, "hidden_state_layers": {0: 0}}),
        ("teacher_dtype", {"teacher_dtype": "bfloat16"}),
    ],
)
def test_what_needs_a_living_teacher_is_refused(name: str, settings: dict[str, Any], build: Any) -> None:
    with pytest.raises(
        ValueError, match=f"^expected a live teacher for model.{name}, found 'offline:x', .* leave {name}"
    ):
        build("offline:x", **settings)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (PhaseEvaluation(), "^expected a live teacher for PhaseEvaluation, found a captured one; name"),
        (
            ExportOnFitEnd(precision="fp16", formats=["hf"], compare_with_teacher=True),
            "^expected a teacher in floating point for ExportOnFitEnd.compare_with_teacher, found a captured one",
        ),
    ],
    ids=["PhaseEvaluation", "ExportOnFitEnd"],
)
def test_callbacks_that_need_a_living_teacher_are_refused(
    callback: Callback, message: str, build: Any, data: Words, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, callbacks=[callback]).fit(build("offline:x"), data)


def test_another_seed_of_the_data_is_refused_with_both_values(
    build: Any, captured: Captured, student_folder: str, tmp_path: Path
) -> None:
    lines = tiny_jsonl(tmp_path / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(40)])
    module = build(f"offline:{captured(datamodule=Conversations(student_folder, train=lines, seed=1))}")
    value = r"[0-9a-f]{12} \(samples \d+, tokens \d+, answer_tokens \d+\)"
    with pytest.raises(
        ValueError, match=rf"expected the data of the split train .*, {value}, found {value}; train with"
    ):
        tiny_trainer(tmp_path).fit(module, Conversations(student_folder, train=lines, seed=2))


def test_loaders_alone_are_refused(build: Any, captured: Captured, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a data module for 'offline:.*, found loaders alone; give"):
        tiny_trainer(tmp_path).fit(build(f"offline:{captured()}"), loader())


# Stages --------------------------------------------------------------------------------------------------------------


def test_validate_and_test_need_their_own_split_only(
    build: Any, captured: Captured, data: Words, tmp_path: Path
) -> None:
    held_out = captured("held out", splits=("val", "test"))
    module, trainer = build(f"offline:{held_out}"), tiny_trainer(tmp_path)
    for stage, split in ((trainer.validate, "val"), (trainer.test, "test")):
        (figures,) = stage(module, data, verbose=False)
        assert {f"{split}/perplexity", f"{split}/kl", f"{split}/top1_agreement"} <= figures.keys()
    with pytest.raises(
        ValueError, match="expected the split train in the captured teacher in .*, found val, test; capture"
    ):
        tiny_trainer(tmp_path).fit(module, data)
    with pytest.raises(
        ValueError, match="expected the split test in the captured teacher in .*, found train, val; capture"
    ):
        tiny_trainer(tmp_path).test(build(f"offline:{captured()}"), data)


def test_predict_does_not_open_the_capture(build: Any, data: Words, tmp_path: Path) -> None:
    batches = tiny_trainer(tmp_path).predict(build("offline:nowhere", generate_tokens=2), data)
    assert sum(map(len, batches)) == 20


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_exact_and_the_checkpoint_needs_no_capture(
    build: Any, captured: Captured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = captured()
    module, path = build(f"offline:{folder}"), tmp_path / "six.ckpt"
    whole, _ = fit(module, tmp_path, save_at=6, path=path)  # in the middle of the second epoch
    resumed = build(f"offline:{folder}")
    rest, _ = fit(resumed, tmp_path, path)
    assert rest.losses == {step: loss for step, loss in whole.losses.items() if step > 6} and len(rest.losses) == 4
    assert rest.samples == whole.samples[-len(rest.samples) :]
    for name, tensor in module.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)

    shutil.rmtree(folder)
    loaded = Distillation.load_from_checkpoint(path)
    assert loaded.teacher_reference == f"offline:{folder}"
    output = tmp_path / "exported"
    given = [str(path), "--output", str(output), "--engine", "none", "--decode-steps", "2"]
    assert export_main([*given, "--benchmark-repetitions", "0"]) == 0, capsys.readouterr().err
    assert any(output.rglob("model.safetensors"))


def test_the_command_line_trains_from_a_capture_and_goes_on(
    captured: Captured, student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = tiny_jsonl(tmp_path / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(40)])
    folder = captured(datamodule=Conversations(student_folder, train=lines))
    recipe = {
        "name": "offline",
        "trainer": {"max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
        "model": {
            "class_path": "Distillation",
            "init_args": {"student": student_folder, "teacher": f"offline:{folder}", "generate_tokens": 0},
        },
        "data": {"class_path": "Conversations", "init_args": {"train": lines}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert train.entry_point(["fit", "--config", "recipe.yaml"]) == 0
    path = "runs/offline-001/checkpoints/last.ckpt"
    assert train.entry_point(["fit", "--config", "recipe.yaml", "--trainer.max_steps=3", "--ckpt_path", path]) == 0
    steps = [torch.load(file, weights_only=True)["global_step"] for file in sorted(Path("runs").rglob("last.ckpt"))]
    assert steps == [2, 3]
    assert json.loads((folder / store.INDEX_FILE).read_text())["form"] == "exact"
