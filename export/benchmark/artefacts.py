"""Finds the artefacts of export folders that this machine can measure, and opens them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from export.benchmark.measure import Session, SharedCache
from export.layout import CPU, ENGINES, GRAPH, MODEL_ENGINE_NAME, STUDENT
from export.sessions.onnx_session import OnnxSession
from program.files import folder_bytes

if TYPE_CHECKING:
    from export.engine.to_tensorrt import Flavour

Runtime = Literal["torch", "onnx", "engine"]
RUNTIMES: tuple[Runtime, ...] = ("torch", "onnx", "engine")
_MISSING: dict[Runtime, str] = {
    "torch": f"there is no {STUDENT}/ (the export left `hf` out)",
    "onnx": f"there is no {GRAPH} (the export left `onnx` out)",
    "engine": f"there is no {ENGINES} (the export left `engine` out)",
}


@dataclass(frozen=True)
class Artefact:
    """Something that runs.

    Attributes:
        name: For tables: folder, runtime and what tells it from others.
        runtime: What runs it.
        device: `cpu` or `cuda`.
        path: The student's folder, the graph or the engine; absolute.
    """

    name: str
    runtime: Runtime
    device: Literal["cpu", "cuda"]
    path: str

    @property
    def bytes(self) -> int:
        """Size on disk, weights included."""
        path = Path(self.path)
        data = path.with_name(path.name + ".data")
        return folder_bytes(path) + (folder_bytes(data) if data.exists() else 0)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the size and without the path, which means nothing on another machine."""
        return {"name": self.name, "runtime": self.runtime, "device": self.device, "bytes": self.bytes}


def find_artefacts(
    folders: Sequence[Path], runtimes: Sequence[Runtime] = RUNTIMES
) -> tuple[list[Artefact], list[dict[str, str]]]:
    """What can be measured, and what can not: `name` and `reason` of each.

    Raises:
        FileNotFoundError: A folder holds no export.
        ValueError: A folder is named twice, or nothing can be measured.
    """
    artefacts: list[Artefact] = []
    skipped: list[dict[str, str]] = []
    for folder, label in _labels(folders).items():
        there = [runtime for runtime in RUNTIMES if _paths(folder, runtime)]
        if not there:
            raise FileNotFoundError(
                f"expected an export folder (with {STUDENT}/, {GRAPH} or engine/) at {str(folder)!r}, found none; "
                "check the path, or write one with `python -m export`"
            )
        for runtime in runtimes:
            found = [artefact for path in _paths(folder, runtime) for artefact in _artefacts(label, runtime, path)]
            reasons = {artefact.name: _why_not(artefact) for artefact in found}
            artefacts += [artefact for artefact in found if reasons[artefact.name] is None]
            reasons |= {} if found else {f"{label} {runtime}": _MISSING[runtime]}
            skipped += [{"name": name, "reason": reason} for name, reason in reasons.items() if reason]
    if not artefacts:
        reason = "; ".join(f"{row['name']}: {row['reason']}" for row in skipped)
        raise ValueError(
            f"expected at least one artefact that runs here, found none ({reason}); choose other --runtimes"
        )
    return artefacts, skipped


def open_session(artefact: Artefact, threads: int | None, length: int) -> Session:
    """Load an artefact.

    Args:
        artefact: One of `find_artefacts`.
        threads: Threads on the CPU; None: the runtime's choice.
        length: Tokens of a conversation at most, for a cache that is made beforehand.
    """
    path = Path(artefact.path)
    if path.name == CPU:
        return SharedCache(path, length=length, threads=threads)
    if artefact.runtime == "onnx":
        return OnnxSession(path, threads=threads)
    # Not above: a process with a graph would load transformers and TensorRT, too, which takes several seconds.
    if artefact.runtime == "engine":
        from export.sessions.engine_session import EngineSession

        return EngineSession(path, _flavour(path))
    from export.sessions.torch_session import TorchSession
    from models.loading.reference import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    dtype = torch.float32 if artefact.device == "cpu" else torch.float16
    return TorchSession(load_model(artefact.path, dtype=dtype).to(artefact.device))  # type: ignore[arg-type]


def _labels(folders: Sequence[Path]) -> dict[Path, str]:
    """A short name for each folder: its own, or, where two have the same, its path from their common parent."""
    absolute = [folder.expanduser().resolve() for folder in folders]
    if len(set(absolute)) < len(absolute):
        twice = next(folder for folder in absolute if absolute.count(folder) > 1)
        raise ValueError(f"expected every folder once, found {twice.name!r} twice; leave one out")
    if len({folder.name for folder in absolute}) == len(absolute):
        return {folder: folder.name for folder in absolute}
    common = Path(os.path.commonpath(absolute))
    return {folder: folder.relative_to(common).as_posix() for folder in absolute}


def _paths(folder: Path, runtime: Runtime) -> list[Path]:
    if runtime == "engine":
        return sorted(folder.glob(ENGINES))
    path, proof = {
        "torch": (folder / STUDENT, folder / STUDENT / "config.json"),
        "onnx": (folder / GRAPH, folder / GRAPH),
    }[runtime]
    return [path] if proof.is_file() else []


def _why_not(artefact: Artefact) -> str | None:
    from export.sessions.engine_session import why_not_runnable

    return why_not_runnable(_flavour(Path(artefact.path))) if artefact.runtime == "engine" else None


def _artefacts(label: str, runtime: Runtime, path: Path) -> list[Artefact]:
    if runtime == "engine":
        return [Artefact(f"{label} {path.stem.removeprefix(f'{MODEL_ENGINE_NAME}-')}", runtime, "cuda", str(path))]
    cpu = Artefact(f"{label} {runtime}", runtime, "cpu", str(path))
    if runtime == "torch" and torch.cuda.is_available():
        return [cpu, Artefact(f"{label} torch float16 on the GPU", runtime, "cuda", str(path))]
    return [cpu]


def _flavour(path: Path) -> "Flavour":
    """The package that built an engine, from its name: `model-PACKAGE-TARGET.engine`, or without PACKAGE in `baseline/`."""
    flavours: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
    return next((flavour for flavour in flavours if path.name.startswith(f"{MODEL_ENGINE_NAME}-{flavour}-")), "auto")
