"""A cache of 8 bits: past and present hold codes, which attention reads as numbers.

In a trace, new keys and values are rounded (QuantizeLinear, DequantizeLinear) and then appended to the past in floating point.  Here
`past_key_values.*` and `present.*` become codes, as cheaply as ONNX allows:

| codes | how                                                                                                       |
|-------|-----------------------------------------------------------------------------------------------------------|
| INT8  | DequantizeLinear moves behind Concat: codes are appended to codes                                         |
| FP8   | Concat takes no FP8: the past is turned into numbers in front of it, and all of it into codes behind it,  |
|       | which gives the same ones                                                                                 |
"""

import onnx_ir as ir

_PARTS = ("cache_quantizer.key.scale", "cache_quantizer.value.scale")


def store_codes(graph: ir.Graph) -> int:
    """Let inputs and outputs of the cache be codes, in place, where a trace rounds keys or values; returns how many."""
    rounding = [node for node in graph if node.op_type == "QuantizeLinear" and _scales_cache(node.inputs[1])]
    for quantize in rounding:
        (dequantize,) = quantize.outputs[0].consumers()
        (append,) = dequantize.outputs[0].consumers()
        past, codes = append.inputs[0], quantize.outputs[0].dtype
        assert past is not None
        assert codes is not None
        assert (dequantize.op_type, append.op_type, past.is_graph_input()) == ("DequantizeLinear", "Concat", True)
        if codes == ir.DataType.INT8:
            _append_codes(graph, quantize, dequantize, append)
        else:
            _append_numbers(graph, quantize, dequantize, append)
        past.type = ir.TensorType(codes)
    return len(rounding)


def _append_codes(graph: ir.Graph, quantize: ir.Node, dequantize: ir.Node, append: ir.Node) -> None:
    joined = append.outputs[0]
    readers = tuple(joined.uses())
    append.replace_input_with(1, quantize.outputs[0])
    graph.remove(dequantize)
    graph.insert_after(append, dequantize)
    dequantize.replace_input_with(0, joined)
    for node, index in readers:
        node.replace_input_with(index, dequantize.outputs[0])
    dequantize.outputs[0].shape, dequantize.outputs[0].type = joined.shape, joined.type
    joined.type = quantize.outputs[0].type


def _append_numbers(graph: ir.Graph, quantize: ir.Node, dequantize: ir.Node, append: ir.Node) -> None:
    past, joined = append.inputs[0], append.outputs[0]
    assert past is not None
    _, *scales = dequantize.inputs
    numbers = ir.Node("", "DequantizeLinear", [past, *scales], dequantize.attributes.values())
    numbers.outputs[0].name, numbers.outputs[0].shape, numbers.outputs[0].type = (
        f"{past.name}.numbers",
        past.shape,
        past.type,
    )
    graph.insert_before(append, numbers)
    append.replace_input_with(0, numbers.outputs[0])
    present = ir.Node("", "QuantizeLinear", [joined, *scales], quantize.attributes.values())
    stored = present.outputs[0]
    stored.name, joined.name = joined.name, f"{joined.name}.numbers"
    stored.shape, stored.type = joined.shape, quantize.outputs[0].type
    for node in (numbers, present):  # of the layer that the notes of its neighbours name
        node.metadata_props.update(append.metadata_props)
        node.name = node.outputs[0].name
    graph.insert_after(append, present)
    graph.outputs[graph.outputs.index(joined)] = stored


def _scales_cache(scale: ir.Value | None) -> bool:
    return scale is not None and (scale.name or "").endswith(_PARTS)
