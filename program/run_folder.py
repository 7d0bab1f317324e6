"""The folder of a run: a new one with the next number, and none where nothing was written."""

import contextlib
import os
import re
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

_made: list[Path] = []  # folders of runs that were not there before


def run_folder(config: Namespace) -> Path:
    """The folder of this run, reserved on disk by rank 0 and handed to other ranks through the environment."""
    if config.run_dir:
        folder = Path(config.run_dir)
        if (folder / "config.yaml").exists():
            raise MisconfigurationException(
                f"expected a new run folder, found a run in {str(folder)!r}; remove it, or leave --run_dir out for a numbered one"
            )
        return folder
    if "POTSTILL_RUN_DIR" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(os.environ["POTSTILL_RUN_DIR"])
    if Path(config.name).name != config.name:
        raise ValueError(
            f"expected a --name without folders, found {config.name!r}; put the folder into --root, the name into --name"
        )
    root = Path(config.root)
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        _made.append(root)
    pattern = re.compile(re.escape(config.name) + r"-(\d+)")
    number = max((int(m[1]) for m in map(pattern.fullmatch, os.listdir(root)) if m), default=0)
    while True:
        number += 1
        folder = root / f"{config.name}-{number:03d}"
        with contextlib.suppress(FileExistsError):  # another run has just taken the number
            folder.mkdir()
            os.environ["POTSTILL_RUN_DIR"] = str(folder)
            return folder


def drop_empty_run_folder() -> None:
    """A run that failed before it wrote anything leaves no folder behind."""
    folder = os.environ.pop("POTSTILL_RUN_DIR", None)
    if folder and Path(folder).is_dir() and not any(Path(folder).iterdir()):
        with contextlib.suppress(FileNotFoundError):  # another rank was first
            Path(folder).rmdir()
    while _made:
        with contextlib.suppress(OSError):  # another run is in it
            _made.pop().rmdir()
