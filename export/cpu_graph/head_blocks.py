"""Head and embedding as 8-bit codes with one scale for each block of features: the form that ONNX Runtime multiplies as it is.

Stored is standard ONNX: INT8 codes (K, N), followed by a DequantizeLinear with a block size.  ONNX Runtime fuses it with its product into
one operator that reads the codes, if the session leaves its option `session.disable_quant_qdq` alone (with it, the codes become
float32 when the file is loaded).

A head that is tied to the embedding is stored once: rows for the embedding, transposed by the runtime at load for the product.  A head
that was quantized with the student (`models/quantization/output_head.py`) keeps the codes it has, and the embedding gets its own.

Letters: K features that the head reads, N columns (tokens), b features of a block, B = K / b blocks.
"""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from export.onnx_graph.edits import Inserter, constant, maker, take_place
from models.copies import shared_copy

BLOCK_SIZES = (64, 32, 16)


def store_head(model: ir.Model) -> bool:
    """Store the head of a graph, and the embedding that it is tied to, in place, in the largest blocks that its features divide into.

    Returns:
        Whether the head has plain weights, such blocks, and nothing (a soft cap) between itself and the logits; otherwise nothing changes.
    """
    graph = model.graph
    product = next(value for value in graph.outputs if value.name == "logits").producer()
    right = product.inputs[1] if product is not None and product.op_type == "MatMul" else None
    transpose = maker(right)
    weight = right if transpose is None else transpose.inputs[0]
    if product is None or weight is None or weight.const_value is None:
        return False
    if transpose is not None and transpose.op_type != "Transpose":  # quantized with the student
        return False
    matrix = weight.const_value.numpy()
    matrix_KN = matrix if transpose is None else matrix.T
    block_size = _block_size(len(matrix_KN))
    if block_size is None:
        return False
    blocks = round_to_nearest(matrix_KN, block_size=block_size)
    if transpose is None:
        columns = _constants(graph, weight.name or "", *blocks)
    else:
        columns = _tied_columns(graph, product, weight, transpose, blocks, block_size)
    product.replace_input_with(1, _dequantized(Inserter(graph, product), columns, block_size))
    if transpose is not None:
        graph.remove(transpose, safe=True)
    if not weight.uses():
        graph.initializers.pop(weight.name or "")
    return True


def store_embedding(model: ir.Model) -> bool:
    """Store an embedding that only tokens are looked up in, in place, in the largest blocks that its features divide into.

    Returns:
        Whether there are such an embedding and such blocks; otherwise nothing changes.
    """
    graph = model.graph
    tokens = next(value for value in graph.inputs if value.name == "input_ids")
    lookups = [use.node for use in tokens.uses() if use.node.op_type == "Gather"]
    if len(lookups) != 1:  # of codes and scales: stored with the head
        return False
    lookup, weight = lookups[0], lookups[0].inputs[0]
    if weight is None or weight.const_value is None or len(weight.uses()) > 1:
        return False
    matrix_KN = weight.const_value.numpy().T
    block_size = _block_size(len(matrix_KN))
    if block_size is None:
        return False
    codes_KN, scales_BN = round_to_nearest(matrix_KN, block_size=block_size)
    _look_up(graph, lookup, _constants(graph, weight.name or "", codes_KN.T, scales_BN.T), block_size)
    graph.initializers.pop(weight.name or "")
    return True


def round_to_nearest(weight_KN: np.ndarray, *, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix to 8 bits with symmetric blocks.

    The weight of the largest magnitude gets the code -128, which has no positive counterpart: so scales can be negative.

    Returns:
        Codes (K, N), int8, and scales (B, N), float32.
    """
    blocks_BbN = weight_KN.astype(np.float32).reshape(-1, block_size, weight_KN.shape[1])
    largest_B1N = np.take_along_axis(blocks_BbN, np.abs(blocks_BbN).argmax(axis=1, keepdims=True), axis=1)
    scales_B1N = np.where(largest_B1N == 0, np.float32(1), largest_B1N / np.float32(-128))
    codes_BbN = np.clip(np.rint(blocks_BbN / scales_B1N), -128, 127)
    return codes_BbN.reshape(weight_KN.shape).astype(np.int8), scales_B1N[:, 0]


def with_stored_head(model: PreTrainedModel, graph: onnx.GraphProto) -> PreTrainedModel:
    """The torch model with head and embedding rounded as a graph stores them, for comparisons; it shares all other tensors.

    Args:
        model: The model that the graph was made from; it is not changed.
        graph: Says which of the two it holds in blocks of 8 bits; their values are computed here.
    """
    makers = {name: node for node in graph.node for name in node.output}
    codes = makers["logits"].input[1]
    while codes in makers:
        codes = makers[codes].input[0]
    rounded = {
        "get_input_embeddings": any(
            node.op_type == "Gather" and node.input[0].endswith(".int8") for node in graph.node
        ),
        "get_output_embeddings": codes.endswith(".int8"),
    }
    changed = shared_copy(model)
    for owner in [getattr(changed, name)() for name, yes in rounded.items() if yes]:
        codes_KN, scales_BN = round_to_nearest(
            owner.weight.detach().t().numpy(), block_size=_block_size(owner.weight.shape[1]) or 1
        )
        values_KN = codes_KN.astype(np.float32) * np.repeat(scales_BN, len(codes_KN) // len(scales_BN), axis=0)
        owner.weight = torch.nn.Parameter(torch.from_numpy(values_KN).t().contiguous(), requires_grad=False)
    return changed


def _block_size(features: int) -> int | None:
    return next((size for size in BLOCK_SIZES if features % size == 0), None)


def _tied_columns(
    graph: ir.Graph,
    product: ir.Node,
    weight: ir.Value,
    transpose: ir.Node,
    blocks: tuple[np.ndarray, np.ndarray],
    block_size: int,
) -> list[ir.Value]:
    """Codes for a head behind a Transpose; an embedding reads the same ones if they can be gathered."""
    name = weight.name or ""
    lookups = [use.node for use in weight.uses() if use.node is not transpose]
    if any(node.op_type != "Gather" for node in lookups):
        return _constants(graph, f"{name}.transposed", *blocks)
    rows = _constants(graph, name, blocks[0].T, blocks[1].T)
    for lookup in lookups:
        _look_up(graph, lookup, rows, block_size)
    make = Inserter(graph, product)
    return [make.node("Transpose", [value], ir.AttrInt64s("perm", [1, 0])) for value in rows]


def _look_up(graph: ir.Graph, lookup: ir.Node, rows: Sequence[ir.Value], block_size: int) -> None:
    """Gather codes and scales in the place of a row of numbers."""
    make = Inserter(graph, lookup)
    found = [make.node("Gather", [value, lookup.inputs[1]], *lookup.attributes.values()) for value in rows]
    take_place(lookup.outputs[0], _dequantized(make, found, block_size, axis=-1))
    graph.remove(lookup, safe=True)


def _constants(graph: ir.Graph, name: str, codes: np.ndarray, scales: np.ndarray) -> list[ir.Value]:
    """What DequantizeLinear reads, as constants of the graph."""
    arrays = {"int8": codes, "scale": scales}
    return [constant(graph, f"{name}.{suffix}", np.ascontiguousarray(array)) for suffix, array in arrays.items()]


def _dequantized(make: Inserter, constants: Sequence[ir.Value], block_size: int, *, axis: int = 0) -> ir.Value:
    layout = [ir.AttrInt64("axis", axis), ir.AttrInt64("block_size", block_size)]
    return make.node("DequantizeLinear", constants, *layout)
