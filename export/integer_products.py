"""Matrix products in whole numbers, 8 bits by 8: what makes long prompts fast on CPUs with VNNI or AMX.

Every row of the left side (a token) is divided by its own scale and rounded to 8 bits, every column of the weight was so before; the
product of the codes is exact, and the two scales are multiplied back in.  With `terms=2` the left side is the sum of two codes, the
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


def integer_products(
    model: ir.Model, *, terms: Literal[1, 2] = 1, keep: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Turn, in place, products with constant right sides (K, N) into products of whole numbers.

    Args:
        model: Graph from `export.to_onnx` with plain float32 weights; `merge_products` should come first.
        terms: 8-bit codes that a left side is the sum of.
        keep: Whether the weight of this name stays as it is.

    Returns:
        Names of the weights that changed.
    """
    graph = model.graph
    rounded: dict[ir.Value, _Codes] = {}
    changed = []
    for node in list(graph):
        weight, transposed = _weight_of(node)
        left = node.inputs[0] if node.inputs else None
        if weight is None or left is None or keep(weight.name or ""):
            continue
        make = Inserter(graph, node)
        if left not in rounded:
            rounded[left] = _rounded(make, left, terms)
        _replace(make, node, rounded[left], weight, transposed=transposed)
        changed.append(weight.name or "")
    RemoveUnusedNodesPass()(model)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    return changed


@dataclass(frozen=True)
class _Codes:
    """A left side: `scale` of every row, and its codes with the weight that each of them has."""

    scale: ir.Value
    codes: list[tuple[ir.Value, float]]


def _rounded(make: Inserter, x: ir.Value, terms: int) -> _Codes:
    """The codes of a tensor, row by row; a row of zeros gets a scale above zero."""
    axis = make.constant("rows.axis", np.array([-1], np.int64))
    largest = make.node("ReduceMax", [make.node("Abs", [x]), axis], ir.AttrInt64("keepdims", 1))
    positive = make.node("Max", [largest, make.constant("rows.least", np.float32(1e-12))])
    scale = make.node("Mul", [positive, make.constant("rows.step", np.float32(1 / _HIGH))])
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


def _weight_of(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """The constant right side of a product, and whether it lies there transposed."""
    right = node.inputs[1] if node.op_type == "MatMul" else None
    maker = None if right is None else right.producer()
    transposed = maker is not None and maker.op_type == "Transpose"
    if maker is not None and transposed:
        right = maker.inputs[0]
    plain = right is not None and right.is_initializer() and right.dtype == ir.DataType.FLOAT
    return (right if plain else None), transposed


def _replace(make: Inserter, product: ir.Node, left: _Codes, weight: ir.Value, *, transposed: bool) -> None:
    assert weight.const_value is not None
    weight_KN = weight.const_value.numpy()
    weight_KN = weight_KN.T if transposed else weight_KN
    scale_N = np.maximum(np.abs(weight_KN).max(axis=0), 1e-12).astype(np.float32) / _HIGH
    codes_KN = np.ascontiguousarray(np.rint(weight_KN / scale_N).astype(np.int8))
    codes = make.constant(f"{weight.name}.int8", codes_KN)
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
