"""Cutting a quantized graph open in front of its activation quantizers, to compare it with torch segment by segment.

Rounding to FP8 is not continuous: a difference in the seventh digit decides now and then that a value falls to the other side,
which moves it by a whole FP8 step (up to 12 %), which moves more values behind it.  After some ten layers, two correct runs
that only add up in another order are as far apart as the rounding noise itself.  So every quantizer of the cut graph is fed
what entered it in torch, and what would have entered it is an output.  All operators, quantizers included, are still the
file's own; each of their results is compared, and no difference is carried across a rounding decision.
"""

from pathlib import Path

import onnx

_SCALE_SUFFIX = ".scale"
_INPUT_QUANTIZER = "input_quantizer" + _SCALE_SUFFIX
FED = ".fed"


def cut_at_quantizers(path: Path) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph of an FP8 file with every activation quantizer fed from outside; its weights stay in their file.

    Returns:
        The graph, with an input `{quantizer}.fed` (B, T, features) for each activation quantizer by its torch name, and which
        of the new outputs would have entered it.
    """
    model = onnx.load(path, load_external_data=False)
    half = {entry.key: entry.value for entry in model.metadata_props}["activations"] == "float16"
    element_type = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    entering: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1].endswith(_INPUT_QUANTIZER):
            quantizer = node.input[1].removesuffix(_SCALE_SUFFIX)
            entering[quantizer] = node.input[0]
            node.input[0] = quantizer + FED
            model.graph.input.append(_tensor(node.input[0], element_type))
    model.graph.output.extend(_tensor(name, element_type) for name in dict.fromkeys(entering.values()))
    return model, entering


def _tensor(name: str, element_type: int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, element_type, ["batch", "sequence", None])
