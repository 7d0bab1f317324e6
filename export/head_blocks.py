"""The head as 4- or 8-bit codes with one scale for each block of a column: the form that ONNX Runtime multiplies as it is.

Stored is standard ONNX: INT4 or INT8 codes (K, N), followed by a DequantizeLinear with a block size.  ONNX Runtime fuses it with its
product into one operator that reads the codes, if the session leaves its option `session.disable_quant_qdq` alone (with it, the codes
become float32 when the file is loaded).

A head that is tied to the embedding is stored once in 8 bits: rows for the embedding, transposed by the runtime at load for the
product.  In 4 bits the product gets codes of its own, and the embedding stays as it is (ONNX cannot gather 4-bit rows).

Letters: K features that the head reads, N columns, b rows of a block, B = K / b blocks.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from export.graph_edits import Inserter, constant, take_place

BLOCK_SIZES = (64, 32, 16)
_SMALLER = (1.0, 0.95, 0.9, 0.85, 0.8)  # scales tried in 4 bits: cutting the largest weight can serve the others


def store_head(model: ir.Model, bits: Literal[4, 8]) -> bool:
    """Store the head of a graph, in place, in the largest blocks that its features divide into.

    Args:
        model: Graph from `export.to_onnx`; its head has plain weights.
        bits: Of a code.

    Returns:
        Whether there are such blocks and nothing (a soft cap) lies between head and logits; otherwise nothing changes.
    """
    graph = model.graph
    product = next(value for value in graph.outputs if value.name == "logits").producer()
    right = product.inputs[1] if product is not None and product.op_type == "MatMul" else None
    if product is None or right is None:
        return False
    transpose = right.producer()
    weight = right if transpose is None else transpose.inputs[0]
    assert weight is not None
    assert weight.const_value is not None
    matrix = weight.const_value.numpy()
    matrix_KN = matrix if transpose is None else matrix.T
    block_size = next((size for size in BLOCK_SIZES if len(matrix_KN) % size == 0), None)
    if block_size is None:
        return False
    blocks = round_to_nearest(matrix_KN, bits=bits, block_size=block_size)
    if transpose is None:
        columns = _constants(graph, weight.name or "", *blocks, bits)
        product.replace_input_with(1, _dequantized(Inserter(graph, product), columns, block_size))
    else:
        _store_transposed(graph, product, transpose, blocks, bits, block_size)
    if not weight.uses():
        graph.initializers.pop(weight.name or "")
    return True


def round_to_nearest(weight_KN: np.ndarray, *, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix with symmetric blocks, of whose scales the one with the smallest squared error is taken.

    The weight of the largest magnitude gets the code -2^(bits - 1), which has no positive counterpart: so scales can be negative.

    Returns:
        Codes (K, N), int8, and scales (B, N), float32.
    """
    blocks_BbN = weight_KN.astype(np.float32).reshape(-1, block_size, weight_KN.shape[1])
    largest_B1N = np.take_along_axis(blocks_BbN, np.abs(blocks_BbN).argmax(axis=1, keepdims=True), axis=1)
    lowest = -(2 ** (bits - 1))
    codes_BbN, scales_B1N = np.zeros_like(blocks_BbN), np.ones_like(largest_B1N)
    error_B1N = np.full_like(largest_B1N, np.inf)
    for smaller in _SMALLER if bits == 4 else _SMALLER[:1]:
        trial_B1N = np.where(largest_B1N == 0, np.float32(1), largest_B1N * np.float32(smaller / lowest))
        trial_BbN = np.clip(np.rint(blocks_BbN / trial_B1N), lowest, -lowest - 1)
        trial_error_B1N = np.square(trial_BbN * trial_B1N - blocks_BbN).sum(axis=1, keepdims=True)
        better = trial_error_B1N < error_B1N
        codes_BbN, scales_B1N = np.where(better, trial_BbN, codes_BbN), np.where(better, trial_B1N, scales_B1N)
        error_B1N = np.minimum(error_B1N, trial_error_B1N)
    return codes_BbN.reshape(weight_KN.shape).astype(np.int8), scales_B1N[:, 0]


def _store_transposed(
    graph: ir.Graph,
    product: ir.Node,
    transpose: ir.Node,
    blocks: tuple[np.ndarray, np.ndarray],
    bits: int,
    block_size: int,
) -> None:
    """Codes for a head behind a Transpose; an embedding reads the same ones if they can be gathered."""
    weight = transpose.inputs[0]
    assert weight is not None
    make, name = Inserter(graph, product), weight.name or ""
    lookups = [use.node for use in weight.uses() if use.node is not transpose]
    if bits == 4 or any(node.op_type != "Gather" for node in lookups):
        columns = _constants(graph, f"{name}.transposed", *blocks, bits)
    else:
        rows = _constants(graph, name, blocks[0].T, blocks[1].T, bits)
        for lookup in lookups:
            at_lookup = Inserter(graph, lookup)
            found = [at_lookup.node("Gather", [value, lookup.inputs[1]], *lookup.attributes.values()) for value in rows]
            take_place(lookup.outputs[0], _dequantized(at_lookup, found, block_size, axis=-1))
            graph.remove(lookup, safe=True)
        columns = [make.node("Transpose", [value], ir.AttrInt64s("perm", [1, 0])) for value in rows]
    product.replace_input_with(1, _dequantized(make, columns, block_size))
    graph.remove(transpose, safe=True)


def _constants(graph: ir.Graph, name: str, codes: np.ndarray, scales: np.ndarray, bits: int) -> list[ir.Value]:
    """What DequantizeLinear reads, as constants of the graph."""
    integers = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    arrays = {f"int{bits}": codes.astype(integers.numpy()), "scale": scales}
    return [constant(graph, f"{name}.{suffix}", np.ascontiguousarray(array)) for suffix, array in arrays.items()]


def _dequantized(make: Inserter, constants: Sequence[ir.Value], block_size: int, *, axis: int = 0) -> ir.Value:
    layout = [ir.AttrInt64("axis", axis), ir.AttrInt64("block_size", block_size)]
    return make.node("DequantizeLinear", constants, *layout)
