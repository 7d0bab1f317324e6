"""The teacher as it would be served without Potstill: what size and speed of a student are compared with."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from export.onnx_graph.to_onnx import export_onnx
from export.phases import Phases
from export.settings import ExportSettings

BASELINE = "baseline"


def export_baseline(
    teacher: PreTrainedModel, output: Path, settings: ExportSettings, phases: Phases
) -> list[dict[str, Any]]:
    """Write the teacher's float32 graph.

    Args:
        teacher: The unquantized teacher on the CPU, float32.
        output: Folder of the export; files go into `baseline/` in it.
        settings: Those of the student.
        phases: Show the progress.

    Returns:
        One row (`path`, `bytes`, `kind`) per artefact.
    """
    graph = output / BASELINE / "onnx" / "model.onnx"
    graph.parent.mkdir(parents=True, exist_ok=True)
    with phases.phase("Teacher: ONNX fp32"):
        written = export_onnx(teacher, graph, precision="fp32", opset=settings.opset)
    return [{"path": graph.relative_to(output).as_posix(), "bytes": written.bytes, "kind": "teacher, ONNX fp32"}]
