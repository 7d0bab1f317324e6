"""Reading what a graph says of itself: how precise it is, what it was made from, how many positions it has."""

from pathlib import Path

import onnx


def read_graph(path: Path) -> onnx.ModelProto:
    """A graph without its weights.

    Raises:
        ValueError: The file is no ONNX graph, or an empty one.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is no ValueError
        if isinstance(error, OSError):
            raise
        raise ValueError(
            f"expected an ONNX graph at {str(path)!r}, found what does not parse ({error}); export it again"
        ) from error
    if not model.graph.node:
        raise ValueError(f"expected an ONNX graph at {str(path)!r}, found an empty one; export it again")
    return model


def metadata_of(graph: Path | onnx.ModelProto) -> dict[str, str]:
    """What `export_onnx` has written there, and the passes behind it; weights are not read."""
    model = read_graph(graph) if isinstance(graph, Path) else graph
    return {entry.key: entry.value for entry in model.metadata_props}
