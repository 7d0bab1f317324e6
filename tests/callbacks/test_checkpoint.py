"""What a process that dies while it writes a checkpoint leaves behind: really dead, no `finally` and no flush."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import AtomicCheckpointIO

DIED = 77


def killed(work: Callable[[], None]) -> int:
    """Do the work in a child process that may end by `os._exit`; its exit status, 0 if it came to the end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # the child must never go back into pytest
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: Any, **__: Any) -> None:
    os._exit(DIED)


def die_half_way(content: Any, file: Any) -> None:
    file.write(b"PK\x03\x04 half a checkpoint")
    file.flush()
    os._exit(DIED)


@pytest.mark.parametrize(
    ("owner", "function", "death"),
    [(torch, "save", die_half_way), (os, "fsync", die), (os, "replace", die)],
    ids=["while writing", "before it is on the disk", "before the new one takes its place"],
)
def test_death_while_writing_leaves_the_last_checkpoint(
    owner: Any, function: str, death: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1, "weights": torch.arange(1000.0)}, path)
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, death)
        assert killed(lambda: AtomicCheckpointIO().save_checkpoint({"step": 2}, path)) == DIED
    survivor = torch.load(path, weights_only=True)
    assert survivor["step"] == 1
    assert torch.equal(survivor["weights"], torch.arange(1000.0))
    AtomicCheckpointIO().save_checkpoint({"step": 3}, path)  # what the dead process left is in nobody's way
    assert torch.load(path, weights_only=True) == {"step": 3}


def test_a_save_is_complete_once_it_returned(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def save_and_die() -> None:
        AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
        die()

    assert killed(save_and_die) == DIED
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]
