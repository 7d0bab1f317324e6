"""Writing files so that a reader never sees half of one: under a temporary name first, renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder inside `parent` (created if missing), removed at the end with whatever was not moved out."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=".writing-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(source: Path, target: Path) -> None:
    """Rename a file or folder; a folder that is already at `target` is replaced."""
    set_permissions(source)
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


def set_permissions(path: Path) -> None:
    """Give a file or folder, and all in it, the permissions that the user's umask leaves: safetensors makes its files private."""
    mask = os.umask(0o077)  # it cannot be read without being set
    os.umask(mask)
    for item in [path, *path.rglob("*")]:
        item.chmod((0o777 if item.is_dir() else 0o666) & ~mask)


def folder_bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder, in bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
