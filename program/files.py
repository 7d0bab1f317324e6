"""The one way to write results: under a new name, flushed to disk, and put in place by a rename.

Readers, a kill and a full disk leave the old result or the new one, never half of one.  A folder replaces a folder by
an exchange of names, a file replaces a file.  A writer locks the folder it writes in (`flock`, which ends with its
process, also across containers), so that the next start can tell what dead processes left, and remove it.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

_STAGING, _ASIDE = ".writing-", ".replaced-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2
_held: set[Path] = set()  # folders that this process alone writes into


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Write into a folder alone, or raise `ValueError`; if missing it is created, and removed if empty at the end."""
    path = folder.resolve()
    if path in _held:  # by this process, further out
        yield
        return
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    if lock is None:
        raise ValueError(
            f"expected to be alone in {str(folder)!r}, found another process that writes into it; wait for it, or choose another folder"
        )
    _held.add(path)
    try:
        sweep(path)
        yield
    finally:
        _held.discard(path)
        os.close(lock)
        if is_new:
            with suppress(OSError):  # it is not empty
                path.rmdir()


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder inside `parent` (created if missing), removed at the end; a full disk raises `ValueError`."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    folder, lock = _new_staging(parent)
    try:
        yield folder
    except Exception as error:
        if not _disk_is_full(error):
            raise
        raise ValueError(
            f"expected room on the disk of {str(parent)!r}, found it full; what was there before is unchanged: free some, and start again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Put in place what `write` writes to a path of the same name; `ValueError` for a folder there, or a full disk."""
    with staging_folder(path.absolute().parent) as folder:
        write(folder / path.name)
        move_into_place(folder / path.name, path)


def move_into_place(source: Path, target: Path, *, ours: Collection[str] | None = None) -> None:
    """Flush a file or folder to disk and rename it, on the same disk; one of the same kind at `target` is replaced.

    With `ours`, patterns of the files that we write, other files of a replaced folder are kept in the new one.

    Raises:
        ValueError: A file would replace a folder, or a folder a file.
    """
    check_kind(target, folder=source.is_dir())
    set_permissions(source)
    if source.is_dir() and target.is_dir():
        for file in foreign_files(target, ours) if ours is not None else ():
            _link(target / file, source / file)
        _flush(source)
        _exchange(source, target)
        shutil.rmtree(source, ignore_errors=True)
    else:
        _flush(source)
        os.replace(source, target)
    _flush_one(target.absolute().parent)


def check_kind(target: Path, *, folder: bool) -> None:
    """Raise `ValueError` if there is a folder where a file shall be, or the other way round."""
    if target.exists() and target.is_dir() is not folder:
        wanted, found = ("folder", "file") if folder else ("file", "folder")
        raise ValueError(
            f"expected a {wanted} or nothing at {str(target)!r}, found a {found}; choose another name, or move it away"
        )


def foreign_files(folder: Path, ours: Collection[str]) -> list[Path]:
    """Files and links in a folder, at any depth, that match none of the patterns of what we write."""
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    return [path for path in found if not any(_matches(path.as_posix(), pattern) for pattern in ours)]


def sweep(parent: Path) -> None:
    """Remove what dead processes left in a folder, and finish what they could not: nothing of it is a result."""
    for left in parent.glob(f"{_STAGING}*"):
        with suppress(FileNotFoundError):  # somebody else sweeps, too
            lock = _lock(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
    for aside in parent.glob(f"{_ASIDE}*"):
        target = aside.with_name(aside.name.removeprefix(_ASIDE))
        with suppress(OSError):
            if target.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(target)


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


def _new_staging(parent: Path) -> tuple[Path, int]:
    """A folder with its lock; tried again if somebody swept it before it was locked."""
    while True:
        folder = Path(mkdtemp(prefix=_STAGING, dir=parent))
        with suppress(FileNotFoundError):
            lock = _lock(folder)
            if lock is not None and folder.exists():
                return folder, lock
            if lock is not None:
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or this process ends; None if another holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _exchange(new: Path, old: Path) -> None:
    """Exchange the names of two folders: in one step on Linux' own file systems, elsewhere in two that `sweep` can finish."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(old))
    aside = old.with_name(_ASIDE + old.name)
    old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def _matches(path: str, pattern: str) -> bool:
    """A star stands for names, not for folders."""
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)


def _link(file: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() or target.is_symlink():
        return  # we write a file of this name now
    try:
        os.link(file, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, target, follow_symlinks=False)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    for inner in path.rglob("*") if path.is_dir() else ():
        if not inner.is_symlink():
            _flush_one(inner)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or the one behind it, says so; libraries in C++ and Rust have the system's words only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=...)`: raise `ValueError` for a key given twice, of which JSON would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found
