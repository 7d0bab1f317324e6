"""FSDP2 on two CPU processes: the same training as in one process, with every tensor of student and teacher spread."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from callbacks import SampleCompletions
from models import Distillation
from models.forward import answer_logits
from models.loading.checkpoint import load_student_checkpoint
from tests.helpers import two_shards
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_batch, tiny_folder

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process (this one), then two, each with its reports and its checkpoint."""
    folder = tmp_path_factory.mktemp("shards")
    tiny_folder(folder / "student")
    tiny_folder(folder / "teacher", seed=7, hidden_size=40, intermediate_size=64)
    two_shards.main(folder, 1)
    command = [sys.executable, "-m", "tests.helpers.two_shards", str(folder), "2"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def report(place: Path, name: str) -> dict[str, Any]:
    return json.loads((place / f"{name}.json").read_text())


def test_two_shards_train_like_one_process(place: Path) -> None:
    """Dataset answers, the student's own, clipping, checkpointed activations, validation."""
    alone = report(place, "1-0")
    assert len(alone["losses"]) == 3
    for rank in range(2):
        sharded = report(place, f"2-{rank}")
        assert sharded["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert sharded["kl"] == pytest.approx(alone["kl"], rel=1e-4)
        assert sharded["logits"] == pytest.approx(alone["logits"], rel=1e-3, abs=1e-3)


def test_student_and_teacher_are_spread(place: Path) -> None:
    assert report(place, "1-0")["sharded"] == {"student": False, "teacher": False}
    assert report(place, "2-1")["sharded"] == {"student": True, "teacher": True}


def test_the_checkpoint_is_an_ordinary_one(place: Path) -> None:
    student, _ = load_student_checkpoint(place / "2.ckpt")
    with torch.no_grad():
        logits = answer_logits(student, tiny_batch()).flatten()[:1000].tolist()
    assert logits == pytest.approx(report(place, "2-0")["logits"], rel=1e-5, abs=1e-5)


class OwnSamples(SampleCompletions):
    """A user's own: it needs the whole student as its base does."""


@pytest.mark.parametrize(
    ("settings", "callbacks", "message"),
    [
        ({}, [SampleCompletions()], "expected a sharded run without .*, found SampleCompletions; leave them out"),
        ({}, [OwnSamples()], "expected a sharded run without .*, found OwnSamples; leave them out"),
        ({"generate_tokens": 8}, [], "expected a sharded teacher in floating point that generates nothing, found .* 8"),
    ],
)
def test_what_needs_a_whole_model_is_refused(
    settings: dict[str, Any], callbacks: list[Any], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Distillation(
        teacher=str(place / "teacher"),
        student=str(place / "student"),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        **{"generate_tokens": 0, **settings},
    )
    module.trainer = Trainer(accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False)
    module._device_mesh = {"data_parallel": None}  # type: ignore[assignment]
    monkeypatch.setattr("models.student.shard", lambda model, mesh: None)
    with pytest.raises(ValueError, match=message):
        module.configure_model()
