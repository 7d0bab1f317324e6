"""Whole runs that die, through the real command line: what comes after the resume is what would have come without it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer

import train
from callbacks import PhaseEvaluation
from datamodules.collate import OptimizerStep
from export.report import read_metrics
from models import Distillation
from tests.helpers.same import assert_same
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_folder, tiny_jsonl

STEPS, PRUNE, QUANTIZE, FREEZE, VALIDATE = 10, 3, 6, 7, 4
RECIPE = {
    "name": "chain",
    "seed_everything": 3,
    "trainer": {
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "precision": "bf16-mixed",
        "log_every_n_steps": 1,
        "val_check_interval": 2 * VALIDATE,  # micro-batches
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "GradualPruning",
                "init_args": {
                    "mlp_sparsity": 0.5,
                    "kv_group_sparsity": 0.5,
                    "start_step": PRUNE - 1,
                    "end_step": PRUNE,
                    "events": 2,
                    "multiple": 8,
                    "calibration_batches": 1,
                },
            },
            {"class_path": "PhaseEvaluation", "init_args": {"generate_tokens": 3, "split": "val"}},
            {"class_path": "QuantizationAwareTraining", "init_args": {"start_step": QUANTIZE, "observe_steps": 1}},
            {"class_path": "Throughput", "init_args": {"every_n_steps": 2}},
            {"class_path": "SampleCompletions", "init_args": {"num_samples": 2, "max_new_tokens": 3}},
        ],
    },
    "model": {
        "class_path": "Distillation",
        "init_args": {
            "student": "student",
            "teacher": "teacher",
            "on_policy": {"start": 1, "share": 0.6, "tokens": 5},
            "generate_tokens": 3,
            "warmup_steps": 2,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        },
    },
    "data": {
        "class_path": "Conversations",
        "init_args": {"train": "my.jsonl", "val_fraction": 0.2, "batch_size": 2, "score_exact_match": True},
    },
    "checkpoint": {"every_n_steps": 1},
}


class DieBetween(Callback):
    """Dies before a micro-batch: the second one of an optimizer step whose first gradients are then lost."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._seen = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._seen = self._seen + 1 if trainer.global_step == self.step else 0
        if self._seen == 2:
            raise RuntimeError("died between micro-batches")


class DieInValidation(Callback):
    """Dies when a validation is about to end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("died in validation")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    tiny_folder(folder / "student", seed=1)
    tiny_folder(folder / "teacher", seed=2)
    tiny_jsonl(folder / "my.jsonl", [(f"{n} plus {n}?", f"It is {2 * n}") for n in range(21)])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


class Run:
    """A run and the tokens that its student sampled, by optimizer step."""

    def __init__(self, *more: str) -> None:
        self.tokens: dict[int, list[list[list[int]]]] = {}
        with_answers = Distillation._with_answers

        def recorded(module: Distillation, batch: dict, step: OptimizerStep) -> dict:
            answered = with_answers(module, batch, step)
            if module._source != "dataset":
                self.tokens.setdefault(module.global_step, []).append(answered["input_ids"].tolist())
            return answered

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Distillation, "_with_answers", recorded)
            self.cli = train.main(["fit", "--config", "recipe.yaml", *more])
        self.trainer, self.folder = self.cli.trainer, Path(self.cli.trainer.default_root_dir)

    @property
    def phases(self) -> list[dict[str, Any]]:
        return next(c for c in self.trainer.callbacks if isinstance(c, PhaseEvaluation)).phases


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return Run("--root", "whole")


@pytest.mark.parametrize(
    ("death", "step", "kept"),
    [
        (DieBetween, PRUNE - 1, PRUNE - 1),  # after the first event, before the second
        (DieBetween, PRUNE, PRUNE),  # pruned, not quantized; the phase is in the checkpoint
        (DieInValidation, VALIDATE, VALIDATE - 1),  # a step is saved with what its validation changed
        (DieBetween, QUANTIZE, QUANTIZE),  # quantizers have observed one batch of the step that is lost
        # Scales are frozen; an epoch has 9 micro-batches, so the 16th, which is validated, lies between two steps.
        (DieInValidation, 2 * VALIDATE, 2 * VALIDATE),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    death: type, step: int, kept: int, uninterrupted: Run, tmp_path: Path
) -> None:
    """Weights, scales, optimizer, schedule, sampled tokens, validation figures and phases, bit for bit."""
    with pytest.raises(RuntimeError, match="died"):
        Run("--root", str(tmp_path), f"--trainer.callbacks+=tests.test_recovery.{death.__name__}",
            f"--trainer.callbacks.step={step}")  # fmt: skip
    last = tmp_path / "chain-001/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == kept
    resumed = Run("--root", str(tmp_path), "--ckpt_path", str(last))

    assert_same(resumed.cli.model.state_dict(), uninterrupted.cli.model.state_dict())
    assert_same(resumed.trainer.optimizers[0].state_dict(), uninterrupted.trainer.optimizers[0].state_dict())
    schedules = [run.trainer.lr_scheduler_configs[0].scheduler.state_dict() for run in (resumed, uninterrupted)]
    assert_same(*schedules)
    assert resumed.cli.model.edits == uninterrupted.cli.model.edits
    assert resumed.tokens == {s: tokens for s, tokens in uninterrupted.tokens.items() if s >= kept}
    assert resumed.phases == uninterrupted.phases
    ours, theirs = read_metrics(resumed.folder / "metrics.csv"), read_metrics(uninterrupted.folder / "metrics.csv")
    for name in ("val/kl", "val/task_score", "train/loss"):
        assert ours[name] == [point for point in theirs[name] if point[0] >= ours[name][0][0]], name
    assert ours["train/loss"][0][0] == kept


def test_dropout_is_the_same_after_a_resume(place: Path, tmp_path: Path) -> None:
    """The global random state is no part of a checkpoint: the step decides what is dropped."""
    student = tiny_folder(place / "dropout", seed=1, attention_dropout=0.3)
    arguments = ["--model.init_args.student", student, "--trainer.max_steps", "8", "--root", str(tmp_path)]
    whole = Run(*arguments)
    with pytest.raises(RuntimeError, match="died"):
        Run(
            *arguments,
            "--trainer.callbacks+=tests.test_recovery.DieInValidation",
            f"--trainer.callbacks.step={VALIDATE}",
        )
    resumed = Run(*arguments, "--ckpt_path", str(tmp_path / "chain-002/checkpoints/last.ckpt"))
    assert_same(resumed.cli.model.state_dict(), whole.cli.model.state_dict())
    other = Run(*arguments, "--seed_everything", "4").cli.model.state_dict()
    assert not all(torch.equal(tensor, other[name]) for name, tensor in whole.cli.model.state_dict().items())


def test_the_uninterrupted_run_had_all_of_it(uninterrupted: Run) -> None:
    """Otherwise the comparison above would show nothing."""
    assert [edit["op"] for edit in uninterrupted.cli.model.edits].count("fake_quantize") == 1
    assert [(phase["name"], phase["step"]) for phase in uninterrupted.phases] == [
        ("pruned", PRUNE),
        ("recovered", QUANTIZE),
        ("quantized", STEPS),
    ]
    for low, high in ((0, PRUNE), (PRUNE, QUANTIZE), (FREEZE, STEPS)):
        assert any(low <= step < high for step in uninterrupted.tokens)
    assert set(range(STEPS)) - uninterrupted.tokens.keys(), "no step on the data's answers"
    assert {len(micro_batches) for micro_batches in uninterrupted.tokens.values()} >= {2}  # an epoch may end with one
    assert uninterrupted.trainer.current_epoch >= 1
    steps = [step for step, _ in read_metrics(uninterrupted.folder / "metrics.csv")["val/kl"]]
    assert len(steps) == STEPS // VALIDATE


def test_samples_and_throughput_of_the_run(uninterrupted: Run) -> None:
    rows = [json.loads(line) for line in (uninterrupted.folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [VALIDATE] * 2 + [2 * VALIDATE] * 2
    figures = read_metrics(uninterrupted.folder / "metrics.csv")
    for part in ("rollout", "teacher", "student"):
        shares = [share for _, share in figures.get(f"throughput/share_{part}", [])]
        assert shares and all(0 <= share <= 1 for share in shares), part


ZYGOTE = """
import json, os, sys, torch
import train
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # makes torch's thread pool, which would not survive the fork
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(train.entry_point(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def start() -> Any:
    """Starts `train.py` processes that may be killed; the imports are paid for once, and each run is a fork."""
    process = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def start_run(*arguments: str) -> tuple[int, Callable[[], int]]:
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline()), lambda: int(process.stdout.readline())

    yield start_run
    process.stdin.close()
    process.wait(30)


@pytest.mark.recipe
def test_kill_9_again_and_again_and_the_run_still_comes_to_its_end(
    start: Callable, uninterrupted: Run, tmp_path: Path
) -> None:
    """The chain with a save after every step; each resumed run is killed as well, at an arbitrary moment."""
    arguments = ["fit", "--config", "recipe.yaml", "--root", str(tmp_path), "--trainer.max_steps", "400"]
    moments, last, steps = random.Random(5), None, [0]
    for number in range(1, 4):
        pid, ended = start(*arguments, *(["--ckpt_path", str(last)] if last else []))
        newest = tmp_path / f"chain-{number:03d}/checkpoints/last.ckpt"
        deadline = time.monotonic() + 100
        while not newest.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.6))
        os.kill(pid, signal.SIGKILL)
        assert ended() == -signal.SIGKILL
        last = newest
        steps.append(torch.load(last, weights_only=True)["global_step"])
    assert steps == sorted(set(steps)), "every resumed run went on where the killed one was"
    end = steps[-1] + 2
    final = Run("--root", str(tmp_path), "--ckpt_path", str(last), "--trainer.max_steps", str(max(end, STEPS)))
    assert final.trainer.global_step == max(end, STEPS)
