"""Matrix products in whole numbers, 8 bits by 8: what makes long prompts fast on CPUs with VNNI or AMX.

A graph of the format `int8` or `int8_static` rounds both sides of a product, as pairs of QuantizeLinear and DequantizeLinear before a
product in floating point: rows of the left side (tokens) with scales found live, or all of it with one calibrated scale; columns of
the weight with theirs.  Here the codes are multiplied, which is exact, and the two scales are multiplied back in: the same result.

ONNX Runtime's MatMulIntegerToFloat multiplies the scales in before a result leaves the core that made it.  In standard operators that is a
pass over all results to make them numbers, and one for each scale; where two cores share no cache, these passes took as long as the
products (512 tokens of SmolLM2-135M on two cores of an EPYC: 0.56 s, 0.32 s where they share one).  Only the scales of rows stay a pass of their own.

The left side is *unsigned*, with a zero point of 128: ONNX Runtime has fast kernels for that case and only a plain loop for signed by
signed.

Letters: K features that a product reads, N columns.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.cpu_graph.cached_attention import DOMAIN
from export.onnx_graph.edits import Inserter, array, maker, take_place

_HIGH = 127
_LEAST_SCALE = 2.0**-24  # of a row, as in `models/quantization/quantizers.py`


def integer_products(model: ir.Model) -> list[str]:
    """Turn, in place, products whose both sides are rounded to 8 bits into products of whole numbers.

    `merge_products` should come first.  Returns names of the weights' codes.
    """
    graph = model.graph
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    changed = []
    for node in list(graph):
        weight = _weight_of(node)
        left = node.inputs[0] if weight is not None else None
        pair = None if left is None else _pair(left)
        if weight is None or left is None or pair is None:
            continue  # rounded weights with inputs that are not: in floating point, as the graph says
        make = Inserter(graph, node)
        if left not in rounded:
            rounded[left] = _codes_and_scale(make, pair)
        _replace(make, node, *rounded[left], weight)
        changed.append(weight.name)
    if changed:
        graph.opset_imports[DOMAIN] = 1
    RemoveUnusedNodesPass()(model)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    return changed


@dataclass(frozen=True)
class _Weight:
    """A right side: codes (K, N) with a scale (N,) for each column."""

    name: str
    codes_KN: np.ndarray
    scale_N: np.ndarray


@dataclass(frozen=True)
class _Pair:
    """A left side that passes through QuantizeLinear and DequantizeLinear: what they read, the scale, and the Reshape behind, if any."""

    x: ir.Value
    scale: ir.Value
    reshape: ir.Node | None


def _pair(left: ir.Value) -> _Pair | None:
    """The pair, to int8, that a left side comes out of; None: there is none."""
    behind = maker(left)
    reshape = behind if behind is not None and behind.op_type == "Reshape" else None
    dequantize = behind if reshape is None else maker(reshape.inputs[0])
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantize = maker(dequantize.inputs[0])
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    x, scale = quantize.inputs[:2]
    output = quantize.attributes.get("output_dtype")
    if x is None or scale is None or output is None or output.as_int() != ir.DataType.INT8:
        return None
    return _Pair(x, scale, reshape)


def _codes_and_scale(make: Inserter, pair: _Pair) -> tuple[ir.Value, ir.Value]:
    """The codes that a graph asks for, and their scale: a constant one is its own, live ones are those of the rows."""
    x, zero = pair.x, make.constant("rows.zero", np.uint8(128))
    if pair.reshape is not None:  # rows of tokens go back to their conversations first
        x = make.node("Reshape", [x, pair.reshape.inputs[1]], *pair.reshape.attributes.values())
    if pair.scale.is_initializer():
        return make.node("QuantizeLinear", [x, pair.scale, zero]), pair.scale
    row_scale = _row_scales(make, x)
    one = make.constant("rows.one", np.float32(1))
    return make.node("QuantizeLinear", [make.node("Div", [x, row_scale]), one, zero]), row_scale


def _row_scales(make: Inserter, x: ir.Value) -> ir.Value:
    axis, keep = make.constant("rows.axis", np.array([-1], np.int64)), ir.AttrInt64("keepdims", 1)
    highest, lowest = (make.node(f"Reduce{which}", [x, axis], keep) for which in ("Max", "Min"))
    largest = make.node("Max", [highest, make.node("Neg", [lowest])])
    scale = make.node("Div", [largest, make.constant("rows.high", np.float32(_HIGH))])
    return make.node("Max", [scale, make.constant("rows.least", np.float32(_LEAST_SCALE))])


def _weight_of(node: ir.Node) -> _Weight | None:
    """The constant right side of a product, if it is int8 codes with a scale for each column."""
    right = node.inputs[1] if node.op_type == "MatMul" else None
    dequantize = maker(right)
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or len(dequantize.inputs) > 2:
        return None
    codes, scale = dequantize.inputs
    if codes is None or scale is None or not (codes.is_initializer() and scale.is_initializer()):
        return None
    by_column = codes.dtype == ir.DataType.INT8 and scale.shape is not None and len(scale.shape) == 1
    return _Weight(codes.name or "", array(codes), array(scale)) if by_column else None


def _replace(make: Inserter, product: ir.Node, left: ir.Value, left_scale: ir.Value, weight: _Weight) -> None:
    zero, of_all = make.constant("rows.zero", np.uint8(128)), left_scale.is_initializer()
    scale = left_scale if of_all else make.constant("rows.one", np.float32(1))
    for value, columns in _results(product):
        name = f"{weight.name}.{columns.start}"
        codes = make.constant(f"{name}.codes", np.ascontiguousarray(weight.codes_KN[:, columns]))
        by_column = make.constant(f"{name}.scale", weight.scale_N[columns])
        scaled = make.node("MatMulIntegerToFloat", [left, codes, scale, by_column, zero], domain=DOMAIN)
        take_place(value, scaled if of_all else make.node("Mul", [scaled, left_scale]))


def _results(product: ir.Node) -> list[tuple[ir.Value, slice]]:
    """What becomes of a product, and of which columns: the products that `merge_products` joined need no copy if they are made apart."""
    whole = product.outputs[0]
    uses = list(whole.uses())
    split = uses[0].node if len(uses) == 1 else None
    sizes = split.inputs[1] if split is not None and split.op_type == "Split" and len(split.inputs) == 2 else None
    if split is None or sizes is None or not sizes.is_initializer():
        return [(whole, slice(0, None))]
    ends = np.cumsum(array(sizes)).tolist()
    starts = [0, *ends[:-1]]
    return [(part, slice(start, end)) for part, start, end in zip(split.outputs, starts, ends, strict=True)]
