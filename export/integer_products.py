"""Matrix products in whole numbers, 8 bits by 8: what makes long prompts fast on CPUs with VNNI or AMX.

Every row of the left side (a token) is divided by its own scale and rounded to 8 bits, every column of the weight was so before; the
product of the codes is exact, and the two scales are multiplied back in.  A graph of the format `int8` or `int8_static` says all this
already, as pairs of QuantizeLinear and DequantizeLinear before a product in floating point: there, codes and scales are the graph's own
and the result is the same.  A graph of plain weights is rounded here.  With `terms=2` the left side is then the sum of two codes, the
second one for what the first one left over: 16 bits, at the price of a second product.

Written in standard operators.  The left side is *unsigned*, with a zero point of 128: ONNX Runtime has fast kernels for that case and
only a plain loop for signed by signed.

Letters: K features that a product reads, N columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.graph_edits import Inserter, take_place

_HIGH = 127
_LEAST_SCALE = 2.0**-24  # of a row, as in `models/quantization/quantizers.py`


def integer_products(
    model: ir.Model, *, terms: Literal[1, 2] = 1, keep: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Turn, in place, products with constant right sides (K, N) into products of whole numbers.

    Args:
        model: Graph from `export.to_onnx`, of the formats above or with plain float32 weights; `merge_products` should come first.
        terms: 8-bit codes that a left side is the sum of, where it is rounded here.
        keep: Whether the plain weight of this name stays as it is.

    Returns:
        Names of the weights that changed.
    """
    graph = model.graph
    rounded: dict[ir.Value, _Codes] = {}
    changed = []
    for node in list(graph):
        left = node.inputs[0] if node.op_type == "MatMul" else None
        weight = _weight_of(node)
        if left is None or weight is None or (weight.scale_N is None and keep(weight.name)):
            continue
        pair = _pair(left)
        if (weight.scale_N is None) != (pair is None):
            continue  # rounded weights with inputs that are not: in floating point, as the graph says
        make = Inserter(graph, node)
        if left not in rounded:
            rounded[left] = _rounded(make, left, terms) if pair is None else _as_rounded(make, pair)
        _replace(make, node, rounded[left], weight)
        changed.append(weight.name)
    RemoveUnusedNodesPass()(model)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    return changed


@dataclass(frozen=True)
class _Codes:
    """A left side: `scale` of every row (or of all), and its codes with the weight that each of them has."""

    scale: ir.Value
    codes: list[tuple[ir.Value, float]]


@dataclass(frozen=True)
class _Weight:
    """A right side (K, N): plain numbers, or codes if there is a scale (N,)."""

    name: str
    array_KN: np.ndarray
    scale_N: np.ndarray | None = None


def _rounded(make: Inserter, x: ir.Value, terms: int) -> _Codes:
    """The codes of a tensor, row by row; a row of zeros gets a scale above zero."""
    scale = _row_scales(make, x)
    left_over = make.node("Div", [x, scale])
    zero = make.constant("rows.zero", np.uint8(128))
    codes, share = [], 1.0
    for term in range(terms):
        step = make.constant(f"rows.step_of_term_{term}", np.float32(share))
        codes.append((make.node("QuantizeLinear", [left_over, step, zero]), share))
        if term + 1 < terms:
            taken = make.node("DequantizeLinear", [codes[-1][0], step, zero])
            left_over = make.node("Sub", [left_over, taken])
        share /= 2 * _HIGH  # what is left over is at most half a step
    return _Codes(scale, codes)


def _row_scales(make: Inserter, x: ir.Value) -> ir.Value:
    axis = make.constant("rows.axis", np.array([-1], np.int64))
    largest = make.node("ReduceMax", [make.node("Abs", [x]), axis], ir.AttrInt64("keepdims", 1))
    scale = make.node("Div", [largest, make.constant("rows.high", np.float32(_HIGH))])
    return make.node("Max", [scale, make.constant("rows.least", np.float32(_LEAST_SCALE))])


@dataclass(frozen=True)
class _Pair:
    """A left side that passes through QuantizeLinear and DequantizeLinear: what they read, the scale, and the Reshape behind, if any."""

    x: ir.Value
    scale: ir.Value
    reshape: ir.Node | None


def _pair(left: ir.Value) -> _Pair | None:
    """The pair, to int8, that a left side comes out of; None: there is none."""
    dequantize = _behind(left, "Reshape").producer()
    quantize = None
    if dequantize is not None and dequantize.op_type == "DequantizeLinear" and dequantize.inputs[0] is not None:
        quantize = dequantize.inputs[0].producer()
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    x, scale = quantize.inputs[:2]
    output = quantize.attributes.get("output_dtype")
    if x is None or scale is None or output is None or output.as_int() != ir.DataType.INT8:
        return None
    return _Pair(x, scale, None if dequantize is left.producer() else left.producer())


def _as_rounded(make: Inserter, pair: _Pair) -> _Codes:
    """The codes that a graph asks for: a constant scale is its own, live ones are those of the rows."""
    x, zero = pair.x, make.constant("rows.zero", np.uint8(128))
    if pair.reshape is not None:  # rows of tokens go back to their conversations first
        x = make.node("Reshape", [x, pair.reshape.inputs[1]], *pair.reshape.attributes.values())
    if pair.scale.is_initializer():
        return _Codes(pair.scale, [(make.node("QuantizeLinear", [x, pair.scale, zero]), 1.0)])
    row_scale = _row_scales(make, x)
    one = make.constant("rows.step_of_term_0", np.float32(1))
    return _Codes(row_scale, [(make.node("QuantizeLinear", [make.node("Div", [x, row_scale]), one, zero]), 1.0)])


def _behind(value: ir.Value, op: str) -> ir.Value:
    """What a value was before an operator that only moves it; the value itself behind any other."""
    maker = value.producer()
    source = maker.inputs[0] if maker is not None and maker.op_type == op else None
    return value if source is None else source


def _weight_of(node: ir.Node) -> _Weight | None:
    """The constant right side of a product: plain, perhaps behind a Transpose, or int8 codes with a scale for each column."""
    right = node.inputs[1] if node.op_type == "MatMul" else None
    if right is None:
        return None
    source = _behind(right, "Transpose")
    if source.is_initializer() and source.dtype == ir.DataType.FLOAT:
        array = _array(source)
        return _Weight(source.name or "", array if source is right else array.T)
    dequantize = right.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or len(dequantize.inputs) > 2:
        return None
    codes, scale = dequantize.inputs
    if codes is None or scale is None or not (codes.is_initializer() and scale.is_initializer()):
        return None
    by_column = codes.dtype == ir.DataType.INT8 and scale.shape is not None and len(scale.shape) == 1
    return _Weight(codes.name or "", _array(codes), _array(scale)) if by_column else None


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _replace(make: Inserter, product: ir.Node, left: _Codes, weight: _Weight) -> None:
    codes_KN, scale_N = weight.array_KN, weight.scale_N
    if scale_N is None:
        scale_N = np.maximum(np.abs(codes_KN).max(axis=0), 1e-12).astype(np.float32) / _HIGH
        codes_KN = np.rint(codes_KN / scale_N).astype(np.int8)
    codes = make.constant(f"{weight.name}.codes", np.ascontiguousarray(codes_KN))
    zero = make.constant("rows.zero", np.uint8(128))
    total: ir.Value | None = None
    for number, (term, share) in enumerate(left.codes):
        whole = make.node("MatMulInteger", [term, codes, zero])
        part = make.node("Cast", [whole], ir.AttrInt64("to", ir.DataType.FLOAT))
        if number:
            part = make.node("Mul", [part, make.constant(f"rows.step_of_term_{number}", np.float32(share))])
        total = part if total is None else make.node("Add", [total, part])
    assert total is not None
    by_column = make.node("Mul", [total, make.constant(f"{weight.name}.scale", scale_N)])
    result = make.node("Mul", [by_column, left.scale])
    take_place(product.outputs[0], result)
