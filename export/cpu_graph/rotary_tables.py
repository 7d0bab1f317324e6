"""The rotary angles of a graph as tables over positions, for operators that turn queries and keys themselves.

Letters: L positions, E head width.
"""

import numpy as np
import onnx_ir as ir
import onnxruntime

_FEW = 8  # positions, whose angles must be the same whether they come alone or with all others


def angle_tables(graph: ir.Graph, cos: ir.Value, sin: ir.Value, positions: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Cosines and sines (L, E / 2) that a graph computes from its input `position_ids`.

    Args:
        graph: The graph; it is not changed.
        cos: A value (B, T, E / 2) of it.
        sin: Likewise.
        positions: L, from 0 on.

    Returns:
        None if the angles depend on more than their own position (frequencies that change with the length).
    """
    position_ids = next(value for value in graph.inputs if value.name == "position_ids")
    try:
        part = ir.convenience.extract(graph, [position_ids], [cos, sin])
    except ValueError:
        return None
    model = ir.to_proto(ir.Model(part, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    all_of_them, few = (
        [table[0] for table in session.run(None, {"position_ids": np.arange(length)[None]})]
        for length in (positions, _FEW)
    )
    if not all(np.array_equal(whole[:_FEW], start) for whole, start in zip(all_of_them, few, strict=True)):
        return None
    return all_of_them[0], all_of_them[1]
