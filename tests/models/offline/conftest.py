"""A captured tiny teacher, and the data it was captured on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.offline import CaptureSettings, capture
from tests.helpers.chat_doubles import Words


@pytest.fixture
def data(student_folder: str) -> Words:
    return Words(student_folder, batch_size=8, seed=3)


@pytest.fixture
def captured(teacher_folder: str, data: Words, tmp_path: Path) -> Callable[..., Path]:
    """Capture train and val into a folder of the test; returns it."""

    def run(name: str = "cache", **changes: Any) -> Path:
        given = {"splits": ("train", "val"), "dtype": torch.float32, "reference": teacher_folder, "datamodule": data}
        given |= {key: changes.pop(key) for key in list(changes) if key in given}
        settings = CaptureSettings(**{"batch_size": 4, "shard_tokens": 200} | changes)
        capture(folder=tmp_path / name, settings=settings, **given)
        return tmp_path / name

    return run
