"""Reading what a graph says of itself: how precise it is, what it was made from, how many positions it has."""

from pathlib import Path

import onnx


def metadata_of(graph: Path | onnx.ModelProto) -> dict[str, str]:
    """What `export_onnx` has written there, and the passes behind it; weights are not read."""
    model = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph
    return {entry.key: entry.value for entry in model.metadata_props}
