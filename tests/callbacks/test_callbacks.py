"""Schedules, refusals and what the smaller callbacks write; exact resume is in `test_resume.py`."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from callbacks import (
    ExportOnFitEnd,
    GradualPruning,
    PhaseEvaluation,
    Preflight,
    QuantizationAwareTraining,
    SampleCompletions,
    Throughput,
)
from datamodules import Conversations
from export.report import read_metrics
from models import SFT, Distillation
from models.architecture import count_parameters, decoder_layers
from models.evaluation.answers import evaluate
from models.generation.on_policy import OnPolicy
from models.post_training.calibrate import quantize_after_training
from models.post_training.format_choice import formats_by_pattern
from models.post_training.settings import PostTrainingQuantization
from models.quantization import quantized_linears
from models.quantization.learned_scales import learned_scales
from tests.helpers.same import assert_same
from tests.helpers.tiny import tiny_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("callbacks")
    rows = [{"prompt": f"{n} plus {n}?", "response": str(2 * n)} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": tiny_folder(folder / "student", seed=1),
        "teacher": tiny_folder(folder / "teacher", seed=2),
        "data": str(folder / "data.jsonl"),
    }


def fit(folders: dict[str, str], place: Path, *callbacks: Callback, steps: int = 6, **settings: Any) -> Trainer:
    """A short distillation with these callbacks."""
    module = Distillation(
        student=folders["student"],
        teacher=folders["teacher"],
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        generate_tokens=4,
        on_policy=OnPolicy(start=1, tokens=4),
    )
    data = Conversations(
        tokenizer=folders["student"], train=folders["data"], batch_size=4, val_fraction=0.2, score_exact_match=True
    )
    defaults: dict[str, Any] = {"accelerator": "cpu", "logger": CSVLogger(str(place), name="", version="")}
    trainer = Trainer(
        **defaults | settings,
        max_steps=steps,
        default_root_dir=place,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    return trainer


class Sizes(Callback):
    """The student's sizes and the identity of its parameters after every micro-batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self.identities: set[frozenset[int]] = set()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        layer = decoder_layers(pl_module.student)[1]
        self.seen.append((trainer.global_step, layer.num_neurons, layer.num_kv_groups))
        self.identities.add(frozenset(id(p) for p in pl_module.student.parameters()))


def test_pruning_follows_its_schedule_under_accumulation(folders: dict[str, str], tmp_path: Path) -> None:
    sizes = Sizes()
    pruning = GradualPruning(
        0.5, 0.5, start_step=2, end_step=4, events=3, schedule="linear", multiple=8, calibration_batches=1
    )
    trainer = fit(folders, tmp_path, pruning, sizes, accumulate_grad_batches=2)
    assert {step: kept for step, *kept in sizes.seen} == {
        0: [48, 2],
        1: [48, 2],
        2: [40, 2],
        3: [32, 1],
        4: [24, 1],
        5: [24, 1],
        6: [24, 1],
    }
    assert len(sizes.identities) == 1
    ops = [edit["op"] for edit in trainer.lightning_module.edits]
    assert ops.count("narrow_mlp") == 6
    assert ops.count("narrow_kv_groups") == 2
    logged = read_metrics(tmp_path / "metrics.csv")["pruning/parameters"]
    assert [step for step, _ in logged] == [0, 2, 3, 4]
    assert logged[-1][1] == count_parameters(trainer.lightning_module.student) < logged[0][1]


class PlainData(LightningDataModule):
    """Somebody else's data module: it trains, but cannot score, calibrate or provide prompts."""

    def train_dataloader(self) -> Any:
        raise AssertionError("training began")


@pytest.mark.parametrize(
    "callback",
    [
        GradualPruning(0.5, start_step=1, end_step=1),
        PhaseEvaluation(),
        ExportOnFitEnd(precision="fp32", formats=["hf"]),
        SampleCompletions(),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_foreign_data_modules_are_refused_before_the_first_step(
    callback: Callback, folders: dict[str, str], tmp_path: Path
) -> None:
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, max_steps=2, callbacks=[callback], logger=False)
    with pytest.raises(ValueError, match="extends ChatDataModule, found none; use"):
        trainer.fit(SFT(student=folders["student"]), [])
    with pytest.raises(ValueError, match="extends ChatDataModule, found PlainData; use"):
        trainer.fit(SFT(student=folders["student"]), datamodule=PlainData())


@pytest.mark.parametrize(
    "settings",
    [
        {"mlp_sparsity": 1.0},
        {"mlp_sparsity": -0.1},
        {"kv_group_sparsity": 2.0},
        {"start_step": 0, "end_step": 0},
        {"start_step": 5, "end_step": 4, "events": 2},
        {"start_step": 5, "end_step": 5, "events": 2},
    ],
)
def test_pruning_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected .* found"):
        GradualPruning(**{"mlp_sparsity": 0.5, "start_step": 1, "end_step": 1} | settings)


@pytest.mark.parametrize("sparsity", [{"mlp_sparsity": 0.95}, {"kv_group_sparsity": 0.8}])
def test_pruning_leaves_something(sparsity: dict[str, float], folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower it"):
        fit(folders, tmp_path, GradualPruning(**sparsity, start_step=1, end_step=1, multiple=16))


def test_order_and_steps_of_callbacks_are_checked(folders: dict[str, str], tmp_path: Path) -> None:
    pruning = partial(GradualPruning, 0.5, start_step=3, end_step=3, multiple=8)
    with pytest.raises(ValueError, match="in the order GradualPruning, QuantizationAwareTraining"):
        fit(folders, tmp_path, QuantizationAwareTraining(4), pruning())
    with pytest.raises(ValueError, match="after the last pruning event"):
        fit(folders, tmp_path, pruning(), QuantizationAwareTraining(3))
    with pytest.raises(ValueError, match="between 1 and 1,000,000,000"):
        QuantizationAwareTraining(0)


def test_quantizers_observe_then_freeze(folders: dict[str, str], tmp_path: Path) -> None:
    class Scales(Callback):
        seen: dict[int, list[float]]

        def __init__(self) -> None:
            self.seen = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            linears = quantized_linears(pl_module.student).values()
            self.seen[trainer.global_step] = [float(q.input_quantizer.scale) for q in linears]

    scales = Scales()
    trainer = fit(folders, tmp_path, QuantizationAwareTraining(2, observe_steps=2), scales)
    assert scales.seen[1] == []
    assert scales.seen[2] == scales.seen[3] == [0.0] * 14
    assert all(scale > 0 for scale in scales.seen[4])
    assert scales.seen[4] == scales.seen[5] == scales.seen[6]
    names = quantized_linears(trainer.lightning_module.student)
    assert all(name.startswith("model.layers.") and name.endswith("_proj") for name in names)


def test_a_student_may_start_from_what_calibration_makes(folders: dict[str, str], tmp_path: Path) -> None:
    class Before(Callback):
        student: Any

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                self.after = copy.deepcopy(pl_module.student)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                self.before = copy.deepcopy(pl_module.student)

    before = Before()
    formats = {"*.down_proj": "int4_g32", "*.o_proj": "none"}
    quantization = QuantizationAwareTraining(2, format="int8", exceptions=formats, method="gptq", calibration_batches=2)
    trainer = fit(folders, tmp_path, before, quantization)
    batches = list(trainer.datamodule.calibration_batches(2, seed=0))  # type: ignore[attr-defined]
    chosen = formats_by_pattern(before.before, "int8", formats)
    quantize_after_training(before.before, batches, chosen, PostTrainingQuantization(method="gptq"))
    assert_same(before.after.state_dict(), before.before.state_dict())
    student = trainer.lightning_module.student
    moved = [not torch.equal(p, q) for p, q in zip(student.parameters(), before.after.parameters(), strict=True)]
    assert any(moved)
    for (_, ours), (_, then) in zip(student.named_buffers(), before.after.named_buffers(), strict=True):
        assert torch.equal(ours, then)  # scales stay


@pytest.mark.parametrize("settings", [{"observe_steps": 2}, {"inputs_after": 1}])
def test_a_method_leaves_nothing_to_observe(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="either QuantizationAwareTraining.method or steps of observation, found gptq"):
        QuantizationAwareTraining(2, method="gptq", **settings)


def test_scales_are_learned_after_the_last_freeze(folders: dict[str, str], tmp_path: Path) -> None:
    class Learned(Callback):
        def __init__(self) -> None:
            self.seen: dict[int, list[Any]] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            linears = quantized_linears(pl_module.student).values()
            scales = [q.scale.clone() for linear in linears for q in linear.quantizers()]
            self.seen[trainer.global_step] = [len(learned_scales(pl_module.student)), scales]

    learned = Learned()
    quantization = QuantizationAwareTraining(
        2, observe_steps=1, inputs_after=2, format="int8_static", exceptions={"*.o_proj": "none"}, learn_scales=True
    )
    trainer = fit(folders, tmp_path, quantization, learned, steps=8)
    assert {step: count for step, (count, _) in learned.seen.items()} == dict.fromkeys(range(1, 5), 0) | dict.fromkeys(
        range(5, 9), 2 * 12
    )
    frozen, first, last = (learned.seen[step][1] for step in (5, 6, 8))
    assert all(
        torch.equal(now, then) for now, then in zip(learned.seen[4][1][1::2], learned.seen[3][1][1::2], strict=True)
    )
    assert any(not torch.equal(now, then) for now, then in zip(first, frozen, strict=True))
    assert all(not torch.equal(now, then) for now, then in zip(last[1::2], frozen[1::2], strict=True))  # of weights
    assert trainer.lightning_module.edits[-1] == {"op": "learn_scales", "weights_follow": False}


def test_learning_scales_wants_layers_that_have_some(folders: dict[str, str], tmp_path: Path) -> None:
    quantization = QuantizationAwareTraining(1, exceptions={"*": "none"}, learn_scales=True)
    with pytest.raises(
        ValueError, match="learn_scales, found exceptions that leave all 14 as they are; change the exc"
    ):
        fit(folders, tmp_path, quantization)
    assert not (tmp_path / "metrics.csv").exists()


def test_phases_are_judged_where_they_end(folders: dict[str, str], tmp_path: Path) -> None:
    phases = PhaseEvaluation(generate_tokens=4, split="val")
    pruning = GradualPruning(0.5, start_step=2, end_step=2, multiple=8, calibration_batches=1)
    trainer = fit(folders, tmp_path, pruning, phases, QuantizationAwareTraining(4, observe_steps=1))
    assert [(phase["name"], phase["step"]) for phase in phases.phases] == [
        ("pruned", 2),
        ("recovered", 4),
        ("quantized", 6),
    ]
    module, data = trainer.lightning_module, trainer.datamodule
    again = evaluate(
        module.student,
        data.val_dataloader(),
        tokenizer=module.tokenizer,
        teacher=module.teacher,
        scorer=lambda texts, batch: data.score(texts, batch, "val"),
        max_new_tokens=4,
        dtype=torch.float32,
    )
    assert {key: phases.phases[-1][key] for key in again} == pytest.approx(again)
    assert phases.phases[-1]["parameters"] == count_parameters(module.student)
    assert phases.teacher_figures["kl"] == 0
    assert phases.constant_answer_score == data.constant_answer_score("val")
    restored = PhaseEvaluation()
    restored.load_state_dict(phases.state_dict())
    assert restored.phases == phases.phases


def test_phases_are_judged_on_test_data_where_there_are_some(
    folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judged = PhaseEvaluation(generate_tokens=0)
    data = SimpleNamespace(has_split=lambda split: True)
    assert judged._choose_split(data) == "test"
    fit(folders, tmp_path, judged)  # its data has train and val
    assert judged.split == "val"
    assert "Phases are judged on the val split: there is no test data" in caplog.messages


def test_phases_need_the_split_that_is_asked_for(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected test data for PhaseEvaluation"):
        fit(folders, tmp_path, PhaseEvaluation(split="test"))
    with pytest.raises(ValueError, match="expected test or val data for PhaseEvaluation"):
        PhaseEvaluation()._choose_split(SimpleNamespace(has_split=lambda split: False))


def test_samples_and_throughput_are_logged(folders: dict[str, str], tmp_path: Path) -> None:
    fit(folders, tmp_path, Throughput(2), SampleCompletions(3, 4), val_check_interval=4, check_val_every_n_epoch=None)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4] * 3
    assert all(set(row) == {"step", "prompt", "completion", "answer"} for row in rows)
    history = read_metrics(tmp_path / "metrics.csv")
    shares = [history[f"throughput/share_{part}"][-1][1] for part in ("rollout", "teacher", "student")]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0
    assert history["throughput/tokens_per_second"][-1][1] > 0
    assert history["val/teacher_perplexity"][0][1] > 1


class Stop(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise RuntimeError("the preflight let it pass")


def test_preflight_passes_a_sound_plan_and_finds_steps_that_never_come(folders: dict[str, str], tmp_path: Path) -> None:
    pruning = partial(GradualPruning, 0.5, 0.5, start_step=1, multiple=8)
    quantization, export = QuantizationAwareTraining(4, 1), ExportOnFitEnd(precision="fp8", formats=["hf", "onnx"])
    with pytest.raises(RuntimeError, match="let it pass"):
        fit(folders, tmp_path, pruning(end_step=3, events=2), quantization, export, Preflight(), Stop())
    with pytest.raises(ValueError, match="max_steps beyond"):
        fit(folders, tmp_path, pruning(end_step=9, events=2), Preflight(), Stop())
    with pytest.raises(ValueError, match="max_steps beyond"):
        fit(folders, tmp_path, QuantizationAwareTraining(5, 1), Preflight(), Stop())


def test_preflight_finds_an_earlier_export_and_missing_room(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"found report\.json"):
        fit(folders, tmp_path, ExportOnFitEnd(precision="fp32", formats=["hf"]), Preflight(), Stop())
    assert (tmp_path / "report.json").read_text() == "{}"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match="free disk"):
            fit(folders, tmp_path, Preflight(), Stop())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ValueError, match="free memory"):
        fit(folders, tmp_path, Preflight(), Stop())


def test_preflight_rehearses_the_export(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("no such operator")

    monkeypatch.setattr("callbacks.preflight.export_onnx", broken)
    with pytest.raises(ValueError, match="no such operator"):
        fit(folders, tmp_path, ExportOnFitEnd(precision="fp32", formats=["onnx"]), Preflight(), Stop())


def test_the_teacher_stays_what_it_was(folders: dict[str, str], tmp_path: Path) -> None:
    pruning = GradualPruning(0.5, start_step=1, end_step=1, multiple=8, calibration_batches=1)
    trainer = fit(folders, tmp_path, pruning, QuantizationAwareTraining(3, 1))
    from models.loading.reference import load_model

    original = load_model(folders["teacher"]).state_dict()
    after = trainer.lightning_module.teacher.model.state_dict()
    assert original.keys() == after.keys()
    assert all(torch.equal(original[name], after[name]) for name in original)
