"""A residual sum and the norm behind it as one operator of ONNX Runtime, SkipSimplifiedLayerNormalization.

ONNX Runtime fuses this pair by itself for older forms of the norm, not for RMSNormalization of opset 23.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.cpu_graph.cached_attention import DOMAIN
from export.onnx_graph.edits import take_place


def norms_with_sums(model: ir.Model) -> int:
    """Fuse, in place, every RMSNormalization over the last axis with the sum that it reads.

    Returns:
        The number of norms that were fused.
    """
    graph = model.graph
    fused = 0
    for norm in list(graph):
        read = norm.inputs[0] if norm.op_type == "RMSNormalization" else None
        total = None if read is None else read.producer()
        if read is None or total is None or total.op_type != "Add" or not _over_last_axis(norm):
            continue
        if any(value is None or value.is_initializer() for value in total.inputs):  # a bias, no residual
            continue
        new = ir.Node(
            DOMAIN,
            "SkipSimplifiedLayerNormalization",
            [*total.inputs, norm.inputs[1]],
            [norm.attributes["epsilon"]] if "epsilon" in norm.attributes else [],
            num_outputs=4,
            name=norm.name,
        )
        graph.insert_before(total, new)
        take_place(norm.outputs[0], new.outputs[0])
        take_place(read, new.outputs[3])
        graph.remove([norm, total], safe=True)
        fused += 1
    if fused:
        graph.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
    return fused


def _over_last_axis(norm: ir.Node) -> bool:
    return "axis" not in norm.attributes or norm.attributes["axis"].as_int() == -1
