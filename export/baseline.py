"""The teacher as it would be served without Potstill: what size and speed of a student are compared with."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from export.files import folder_bytes, staging_folder
from export.progress import Phases
from export.settings import ExportSettings
from export.to_onnx import export_onnx
from export.to_tensorrt import build_engine, default_profiles

BASELINE = "baseline"


def export_baseline(teacher: PreTrainedModel, output: Path, settings: ExportSettings) -> list[dict[str, Any]]:
    """Write the teacher's float32 graph (for ONNX Runtime) and, if engines are wanted, its float16 engine.

    Args:
        teacher: The unquantized teacher on the CPU.
        output: Folder of the export; files go into `baseline/` in it.
        settings: Those of the student.

    Returns:
        One row (`path`, `bytes`, `kind`) per artefact.
    """
    phases = Phases()
    graph = output / BASELINE / "onnx" / "model.onnx"
    graph.parent.mkdir(parents=True, exist_ok=True)
    with phases.phase("Teacher: ONNX fp32"):
        written = export_onnx(teacher, graph, precision="fp32", opset=settings.opset)
    rows = [{"path": _relative(graph, output), "bytes": written.bytes, "kind": "teacher, ONNX fp32"}]
    if "engine" in settings.formats:
        target = "+".join(settings.compute_capability) or "portable"
        with staging_folder(output) as staging, phases.phase("Teacher: engine fp16"):
            export_onnx(teacher, staging / "model.onnx", precision="fp16", opset=settings.opset)
            engine = build_engine(
                staging / "model.onnx",
                output / BASELINE / "engine" / f"model-{target}.engine",
                profiles=default_profiles(settings.batch, settings.sequence, settings.past),
                compute_capabilities=settings.compute_capability,
                flavour=settings.tensorrt,
            )
        kind = f"teacher, {engine.flavour} engine fp16"
        rows.append({"path": _relative(engine.path, output), "bytes": folder_bytes(engine.path), "kind": kind})
    return rows


def _relative(path: Path, output: Path) -> str:
    return path.relative_to(output).as_posix()
