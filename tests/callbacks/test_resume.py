"""A crash and a resume give the same bits as the uninterrupted run, whatever stands on either side of the crash."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from callbacks import AtomicCheckpointIO, Checkpoint, GradualPruning, QuantizationAwareTraining
from datamodules import Conversations
from models import Distillation
from models.generation.on_policy import OnPolicy
from models.quantization import quantized_linears
from models.quantization.cache import cache_scales
from models.quantization.learned_scales import SCALE_RATE, learned_scales
from tests.helpers.same import assert_same
from tests.helpers.tiny import sums

STEPS, PRUNE_AT, QUANTIZE_AT, FREEZE_AT = 12, (3, 5), 7, 9


class Crash(Callback):
    """Stops the process's work after a given optimizer step, as far as a test can; never with `at` 0."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.at and trainer.global_step == self.at:
            raise RuntimeError("crash")


class Losses(Callback):
    """Every micro-batch's loss and what it was computed on."""

    def __init__(self) -> None:
        self.seen: dict[int, list[float]] = {}
        self._step = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault(self._step, []).append(float(outputs["loss"]))


class Scales(Callback):
    """All scales after each optimizer step, one after the other."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        linears = quantized_linears(pl_module.student).values()
        scales = [quantizer.scale.flatten() for linear in linears for quantizer in linear.quantizers()]
        self.seen[trainer.global_step] = torch.cat([torch.empty(0), *scales])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return sums(tmp_path_factory.mktemp("places"), 22)


def fit(
    places: dict[str, str],
    folder: Path,
    crash_at: int = 0,
    resume: bool = False,
    quantization: QuantizationAwareTraining | None = None,
    others: Sequence[Callback] = (),
) -> tuple[Trainer, Losses]:
    """One run with everything on: two stages, pruning, quantization, accumulation, a learning rate schedule, epochs."""
    module = Distillation(
        student=places["student"],
        teacher=places["teacher"],
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        warmup_steps=2,
        on_policy=OnPolicy(start=2, share=0.5, tokens=6),
    )
    data = Conversations(tokenizer=places["student"], train=places["data"], batch_size=3, val_fraction=0.2, seed=3)
    losses = Losses()
    callbacks = [
        GradualPruning(
            0.5, 0.5, start_step=PRUNE_AT[0], end_step=PRUNE_AT[1], events=2, multiple=8, calibration_batches=2
        ),
        quantization or QuantizationAwareTraining(QUANTIZE_AT, FREEZE_AT - QUANTIZE_AT, kv_cache="fp8_e4m3"),
        losses,
        *others,
        Crash(crash_at),
        Checkpoint(every_n_steps=1),
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        precision="bf16-mixed",
        default_root_dir=folder,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    last = str(folder / "checkpoints/last.ckpt") if resume else None
    if crash_at:
        with pytest.raises(RuntimeError, match="crash"):
            trainer.fit(module, data)
    else:
        trainer.fit(module, data, ckpt_path=last)
    return trainer, losses


@pytest.fixture(scope="module")
def uninterrupted(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Losses]:
    return fit(places, tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7, 8, 9, 11])
def test_crash_and_resume_equal_the_uninterrupted_run(
    step: int, places: dict[str, str], uninterrupted: tuple[Trainer, Losses], tmp_path: Path
) -> None:
    fit(places, tmp_path, crash_at=step)
    trainer, losses = fit(places, tmp_path, resume=True)
    expected, expected_losses = uninterrupted
    ours, theirs = trainer.lightning_module, expected.lightning_module
    assert ours.edits == theirs.edits
    assert {s: losses.seen[s] for s in range(step, STEPS)} == {s: expected_losses.seen[s] for s in range(step, STEPS)}
    assert_same(ours.state_dict(), theirs.state_dict())
    assert_same(trainer.optimizers[0].state_dict(), expected.optimizers[0].state_dict())
    schedules = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (trainer, expected)]
    assert schedules[0] == schedules[1]


@pytest.mark.parametrize("step", [QUANTIZE_AT, QUANTIZE_AT + 2])
def test_a_run_from_a_calibrated_student_resumes_without_calibrating_again(
    step: int, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [fit(places, tmp_path / "whole", quantization=with_head())[0]]
    fit(places, tmp_path / "halves", crash_at=step, quantization=with_head())
    monkeypatch.delattr("callbacks.quantization.calibrate_quantizers")
    runs.append(fit(places, tmp_path / "halves", resume=True, quantization=with_head())[0])
    assert "lm_head" in quantized_linears(runs[0].lightning_module.student)
    whole, halves = (trainer.lightning_module for trainer in runs)
    assert whole.edits == halves.edits
    assert_same(halves.state_dict(), whole.state_dict())
    assert_same(runs[1].optimizers[0].state_dict(), runs[0].optimizers[0].state_dict())


def with_head() -> QuantizationAwareTraining:
    """The head is tied to the embedding, and gets a weight of its own in the middle of the run."""
    return calibrated(exceptions={"lm_head": "int8_weight_only"})


def calibrated(**settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(
        QUANTIZE_AT, format="int8_static", kv_cache="int8", method="gptq", calibration_batches=2, **settings
    )


def observed() -> QuantizationAwareTraining:
    return QuantizationAwareTraining(QUANTIZE_AT, observe_steps=1, inputs_after=1, learn_scales=True)


@pytest.mark.parametrize(
    ("quantization", "weights_follow", "learning_from", "steps"),
    [
        (observed, False, FREEZE_AT, (FREEZE_AT - 1, FREEZE_AT, FREEZE_AT + 2)),
        (partial(calibrated, learn_scales=True), True, QUANTIZE_AT, (QUANTIZE_AT, QUANTIZE_AT + 3)),
    ],
    ids=["observed", "calibrated"],
)
def test_learned_scales_resume_as_the_weights_do(
    quantization: Any,
    weights_follow: bool,
    learning_from: int,
    steps: tuple[int, ...],
    places: dict[str, str],
    tmp_path: Path,
) -> None:
    scales = Scales()
    whole, losses = fit(places, tmp_path / "whole", quantization=quantization(), others=[scales])
    module = whole.lightning_module
    assert module.edits[-1] == {"op": "learn_scales", "weights_follow": weights_follow}
    learned = learned_scales(module.student)
    assert len(learned) == 28  # of the weight and the input of 14 layers
    groups = whole.optimizers[0].param_groups
    assert [len(group["params"]) for group in groups] == [len(list(module.student.parameters())) - 28, 28]
    assert [group["weight_decay"] for group in groups] == [0.01, 0]
    assert groups[0]["lr"] < 3e-3
    assert groups[1]["lr"] == pytest.approx(SCALE_RATE * groups[0]["lr"])
    # Steps may be smaller than the distance of float16 numbers, and add up.
    assert (scales.seen[learning_from] != scales.seen[STEPS]).float().mean() > 0.8
    assert all(torch.equal(seen.half().float(), seen) for seen in scales.seen.values())
    for step in steps:
        folder = tmp_path / f"crash at {step}"
        fit(places, folder, crash_at=step, quantization=quantization())
        resumed, again = fit(places, folder, resume=True, quantization=quantization())
        assert resumed.lightning_module.edits == module.edits
        assert {s: again.seen[s] for s in range(step, STEPS)} == {s: losses.seen[s] for s in range(step, STEPS)}
        assert_same(resumed.lightning_module.state_dict(), module.state_dict())
        assert_same(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
        schedules = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (resumed, whole)]
        assert schedules[0] == schedules[1]
    checkpoint = tmp_path / "whole/checkpoints/last.ckpt"
    loaded = Distillation.load_from_checkpoint(checkpoint, weights_only=True)
    assert_same(loaded.state_dict(), module.state_dict())


def test_frozen_scales_can_be_learned_after_a_resume_but_not_the_other_way_round(
    places: dict[str, str], tmp_path: Path
) -> None:
    fit(places, tmp_path, crash_at=FREEZE_AT + 1)
    shutil.copytree(tmp_path, tmp_path / "copy")
    trainer, _ = fit(places, tmp_path, resume=True, quantization=observed())
    frozen = torch.load(tmp_path / "copy/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert trainer.lightning_module.edits[-1] == {"op": "learn_scales", "weights_follow": False}
    now = trainer.lightning_module.state_dict()
    scales = [name for name in frozen if name.endswith("quantizer.scale")]
    assert sum(not torch.equal(now[name], frozen[name]) for name in scales) > len(scales) / 2
    fit(places, tmp_path / "learned", crash_at=FREEZE_AT + 1, quantization=observed())
    with pytest.raises(ValueError, match="for a checkpoint whose scales are learned already, found it false; set"):
        fit(places, tmp_path / "learned", resume=True)


def test_the_run_had_something_on_both_sides(uninterrupted: tuple[Trainer, Losses], places: dict[str, str]) -> None:
    trainer, losses = uninterrupted
    module = trainer.lightning_module
    assert module.student.config.intermediate_size == 24
    assert module.student.config.num_key_value_heads == 1
    assert len(quantized_linears(module.student)) == 14
    assert len([scale for scale in cache_scales(module.student) if scale > 0]) == 4
    assert trainer.current_epoch >= 2
    stages = [module.own_answers.source(step, STEPS) != "dataset" for step in range(STEPS)]
    assert any(stages[2:5]) and any(stages[9:]) and not all(stages[2:])
    assert sorted(losses.seen) == list(range(STEPS))
    assert trainer.optimizers[0].param_groups[0]["lr"] < 3e-3


def test_optimizer_and_student_hold_the_same_parameters(uninterrupted: tuple[Trainer, Losses]) -> None:
    trainer, _ = uninterrupted
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.lightning_module.student.parameters()}


def test_checkpoints_hold_primitives_and_no_teacher(places: dict[str, str], tmp_path: Path) -> None:
    trainer, _ = fit(places, tmp_path)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    assert not [key for key in checkpoint["state_dict"] if not key.startswith("student.")]
    loaded = Distillation.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert_same(loaded.state_dict(), trainer.lightning_module.state_dict())


def test_a_kill_in_the_middle_of_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    real_save = torch.save

    def killed(content: Any, file: Any) -> None:
        file.write(b"half a check")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    monkeypatch.setattr(torch, "save", real_save)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
