"""Cutting a quantized graph open in front of its activation quantizers, to compare it with torch segment by segment.

Rounding to FP8 is not continuous: a difference in the seventh digit decides now and then that a value falls to the other side,
which moves it by a whole FP8 step (up to 12 %), which moves more values behind it.  After some ten layers, two correct runs
that only add up in another order are as far apart as the rounding noise itself.  So every quantizer of the cut graph is fed
what entered it in torch, and what would have entered it is an output.  All operators, quantizers included, are still the
file's own; each of their results is compared, and no difference is carried across a rounding decision.
"""

from collections.abc import Iterator
from pathlib import Path

import onnx

_CALIBRATED = ("input_quantizer.scale", "cache_quantizer.key.scale", "cache_quantizer.value.scale")
_WEIGHT_SCALE = ".weight_quantizer.scale"
FED = ".fed"


def cut_at_quantizers(path: Path) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph of a quantized file with every activation quantizer fed from outside; its weights stay in their file.

    Returns:
        The graph, with an input `{quantizer}.fed` for each activation quantizer by its torch name, and which of the new outputs would
        have entered it.
    """
    model = onnx.load(path, load_external_data=False)
    half = {entry.key: entry.value for entry in model.metadata_props}["activations"] == "float16"
    element_type = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    entering: dict[str, str] = {}
    for quantizer, node in _entrances(model.graph):
        entering[quantizer] = node.input[0]
        node.input[0] = quantizer + FED
        model.graph.input.append(onnx.helper.make_tensor_value_info(node.input[0], element_type, None))
    for name in dict.fromkeys(entering.values()):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, element_type, None))
    return model, entering


def _entrances(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """The node that an activation enters on its way to being rounded, with the name of the (first) quantizer in torch.

    With a calibrated scale, that is QuantizeLinear itself.  A scale for each token is computed from the activation as rows: the
    node is the Reshape that makes these rows, and the name follows from a weight that the rounded rows are multiplied with.
    """
    makers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    stored = {value.name for value in graph.output}  # the cache, whose new entries were rounded before
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.output[0] in stored:
            continue
        if node.input[1].endswith(_CALIBRATED):
            yield node.input[1].removesuffix(".scale"), node
        else:
            following = node
            while following.op_type != "MatMul":
                following = users[following.output[0]][0]
            weight_scale = makers[following.input[1]].input[1]
            assert weight_scale.endswith(_WEIGHT_SCALE), weight_scale
            yield weight_scale.removesuffix(_WEIGHT_SCALE) + ".input_quantizer", makers[node.input[0]]
