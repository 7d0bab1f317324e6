"""Weights of matrix products as 4- or 8-bit codes with one scale for each block of a column: the form that ONNX Runtime multiplies as it is.

Stored is standard ONNX: INT4 or INT8 codes (K, N), followed by a DequantizeLinear with a block size.  ONNX Runtime fuses it with its
product into one operator that reads the codes, if K is a multiple of the block, and if the session leaves its option
`session.disable_quant_qdq` alone (with it, the codes become float32 when the file is loaded).

A head that is tied to the embedding is stored once in 8 bits: rows for the embedding, transposed by the runtime at load for the
product.  In 4 bits the product gets codes of its own, and the embedding stays as it is (ONNX cannot gather 4-bit rows).

Letters: K features that a product reads, N columns, B = K / block size blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.graph_edits import Inserter, constant, take_place

BITS = (4, 8)
_SMALLER = (
    1.0,
    0.95,
    0.9,
    0.85,
    0.8,
)  # scales that are tried in 4 bits: cutting the largest weight can serve the others


@dataclass(frozen=True)
class Blocks:
    """A matrix as codes; its weights are `(codes - zero point) * scale`, with one scale for all rows of a block.

    Attributes:
        codes_KN: Whole numbers in [-2^(bits - 1), 2^(bits - 1) - 1], int8.
        scales_BN: float32.
        bits: 4 or 8.
        zero_points_BN: Whole numbers in the codes' range, int8; None: 0.
    """

    codes_KN: np.ndarray
    scales_BN: np.ndarray
    bits: int
    zero_points_BN: np.ndarray | None = None

    @property
    def block_size(self) -> int:
        """Rows of a block."""
        return len(self.codes_KN) // len(self.scales_BN)


def round_to_nearest(weight_KN: np.ndarray, *, bits: int, block_size: int) -> Blocks:
    """Round a matrix with symmetric blocks, of whose scales the one with the smallest squared error is taken.

    The weight of the largest magnitude gets the code -2^(bits - 1), which has no positive counterpart: so scales can be negative.

    Raises:
        ValueError: The rows are no multiple of the block size.
    """
    _check_rows(weight_KN.shape[0], block_size)
    blocks_BbN = weight_KN.astype(np.float32).reshape(-1, block_size, weight_KN.shape[1])
    largest_B1N = np.take_along_axis(blocks_BbN, np.abs(blocks_BbN).argmax(axis=1, keepdims=True), axis=1)
    lowest = -(2 ** (bits - 1))
    best = error = None
    for smaller in _SMALLER if bits == 4 else (1.0,):
        scales_B1N = np.where(largest_B1N == 0, np.float32(1), largest_B1N * np.float32(smaller / lowest))
        codes_BbN = np.clip(np.rint(blocks_BbN / scales_B1N), lowest, -lowest - 1)
        error_B1N = np.square(codes_BbN * scales_B1N - blocks_BbN).sum(axis=1, keepdims=True)
        if best is None or error is None:
            best, error = (codes_BbN, scales_B1N), error_B1N
        else:
            better = error_B1N < error
            best = np.where(better, codes_BbN, best[0]), np.where(better, scales_B1N, best[1])
            error = np.minimum(error, error_B1N)
    assert best is not None
    return Blocks(best[0].reshape(weight_KN.shape).astype(np.int8), best[1][:, 0], bits)


def block_weights(
    model: ir.Model,
    *,
    bits: int = 4,
    block_size: int = 32,
    head_bits: int | None = None,
    given: Mapping[str, Blocks] | None = None,
    keep: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Store, in place, the weights of all matrix products with a constant right side as blocks.

    Args:
        model: Graph from `export.to_onnx` with plain weights, before `merge_products`.
        bits: 4 or 8.
        block_size: Rows of a block, a power of two from 16 on that divides the features of every product.
        head_bits: Bits of the last product; None: `bits`.
        given: Codes and scales by the name of the weight in the graph, which are stored instead of rounded ones.
        keep: Whether the weight of this name stays as it is.

    Returns:
        Names of the weights.

    Raises:
        ValueError: Such bits or blocks are not possible, or `given` names a weight that no product has.
    """
    for number in (bits, head_bits):
        if number is not None and number not in BITS:
            raise ValueError(f"expected 4 or 8 bits, found {number}; choose one of these")
    given = given or {}
    stored = []
    graph = model.graph
    head = graph.outputs[0].producer()
    for node in list(graph):
        weight = _weight_of(node)
        name = "" if weight is None else weight.name or ""
        if weight is None or keep(name):
            continue
        stored.append(name)
        number = head_bits if node is head and head_bits is not None else bits
        if node.inputs[1] is weight:
            blocks = given.get(name) or round_to_nearest(_array(weight), bits=number, block_size=block_size)
            node.replace_input_with(
                1, _dequantized(Inserter(graph, node), _constants(graph, name, blocks), blocks.block_size)
            )
            graph.initializers.pop(name)
        else:
            blocks = given.get(name) or round_to_nearest(_array(weight).T, bits=number, block_size=block_size)
            _store_transposed(graph, node, weight, blocks)
    unknown = sorted(set(given) - set(stored))
    if unknown:
        raise ValueError(
            f"expected codes for weights of matrix products, found {unknown[0]!r} that no product reads; choose among "
            f"{', '.join(stored[:3])}, ..."
        )
    return stored


def _check_rows(rows: int, block_size: int) -> None:
    if block_size < 16 or block_size & (block_size - 1) or rows % block_size:
        raise ValueError(
            f"expected a block size that is a power of two from 16 on and divides the {rows} features of a product, found "
            f"{block_size}; choose 32"
        )


def _weight_of(node: ir.Node) -> ir.Value | None:
    """The constant right side of a product, as it lies in the graph or behind a Transpose; None for other nodes."""
    right = node.inputs[1] if node.op_type == "MatMul" else None
    if right is None:
        return None
    producer = right.producer()
    if producer is not None and producer.op_type == "Transpose":
        right = producer.inputs[0]
    return right if right is not None and right.is_initializer() else None


def _array(weight: ir.Value) -> np.ndarray:
    assert weight.const_value is not None
    return weight.const_value.numpy()


def _constants(graph: ir.Graph, name: str, blocks: Blocks, *, transposed: bool = False) -> list[ir.Value]:
    """What DequantizeLinear reads, as constants of the graph: codes, scales, and zero points if there are any."""
    integers = ir.DataType.INT4 if blocks.bits == 4 else ir.DataType.INT8
    arrays = {
        f"int{blocks.bits}": blocks.codes_KN.astype(integers.numpy()),
        "scale": blocks.scales_BN.astype(np.float32),
    }
    if blocks.zero_points_BN is not None:
        arrays["zero_point"] = blocks.zero_points_BN.astype(integers.numpy())
    return [
        constant(graph, f"{name}.{suffix}", np.ascontiguousarray(array.T if transposed else array))
        for suffix, array in arrays.items()
    ]


def _dequantized(make: Inserter, constants: Sequence[ir.Value], block_size: int, *, axis: int = 0) -> ir.Value:
    layout = [ir.AttrInt64("axis", axis), ir.AttrInt64("block_size", block_size)]
    return make.node("DequantizeLinear", constants, *layout)


def _store_transposed(graph: ir.Graph, product: ir.Node, weight: ir.Value, blocks: Blocks) -> None:
    """Codes for a head behind a Transpose; an embedding reads the same ones if they can be gathered."""
    right = product.inputs[1]
    transpose = None if right is None else right.producer()
    assert transpose is not None
    make = Inserter(graph, product)
    lookups = [use.node for use in weight.uses() if use.node is not transpose]
    if blocks.bits == 4 or any(node.op_type != "Gather" for node in lookups):
        columns = _constants(graph, f"{weight.name}.transposed", blocks)
    else:
        rows = _constants(graph, weight.name or "", blocks, transposed=True)
        for lookup in lookups:
            at_lookup = Inserter(graph, lookup)
            found = [at_lookup.node("Gather", [value, lookup.inputs[1]], *lookup.attributes.values()) for value in rows]
            take_place(lookup.outputs[0], _dequantized(at_lookup, found, blocks.block_size, axis=-1))
            graph.remove(lookup, safe=True)
        turn = ir.AttrInt64s("perm", [1, 0])
        columns = [make.node("Transpose", [value], turn) for value in rows]
    product.replace_input_with(1, _dequantized(make, columns, blocks.block_size))
    graph.remove(transpose, safe=True)
    if not weight.uses():
        graph.initializers.pop(weight.name or "")
