"""One matrix product in place of several that read the same tensor: query, key and value; gate and up.

A step of one token spends its time on reading weights and on starting operators; one wide product reads the same weights and starts
fewer operators.  Every column is the same sum as before.  The right side of a product is a constant, or constant codes behind a
DequantizeLinear; both are joined along their last axis, which is that of the columns.

Letters: K features that the products read, N columns of one product.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.onnx_graph.edits import Inserter, array, constant, maker, take_place

JOIN = "+"  # `q_proj.weight` and `k_proj.weight` become `q_proj.weight+k_proj.weight`


def merge_products(model: ir.Model) -> int:
    """Merge, in place, all products with constant right sides (K, N) that read the same tensor and are stored alike.

    Returns how many are gone.
    """
    alike: dict[tuple[object, ...], list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        kind = _kind(node)
        if kind is not None:
            alike[(node.inputs[0], *kind)].append(node)
    groups = [products for products in alike.values() if len(products) > 1]
    for products in groups:
        _merge(model.graph, products)
    return sum(len(products) - 1 for products in groups)


def _kind(node: ir.Node) -> tuple[object, ...] | None:
    """What products must have in common to be merged; None for a node that is no product with a constant right side."""
    if node.op_type != "MatMul":
        return None
    right = node.inputs[1]
    assert right is not None
    if right.is_initializer():
        return _stored_alike([right]) if right.shape is not None and len(right.shape) == 2 else None
    dequantize = right.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or len(right.uses()) > 1:
        return None
    constants = [value for value in dequantize.inputs if value is not None]
    # One scale for a whole matrix can't be joined; neither can scales of its rows, or of blocks along them.
    joins = all(value.is_initializer() and value.shape is not None and len(value.shape) > 0 for value in constants)
    layout = {name: attribute.value for name, attribute in dequantize.attributes.items()}
    if not joins or layout.get("axis", 1) not in ((0, -2) if layout.get("block_size") else (1, -1)):
        return None
    return (*_stored_alike(constants), *sorted(layout.items()))


def _stored_alike(values: Sequence[ir.Value]) -> tuple[object, ...]:
    """Types, and all sizes but the last, of constants."""
    return tuple((value.dtype, tuple(value.shape[:-1]) if value.shape is not None else None) for value in values)


def _merge(graph: ir.Graph, products: list[ir.Node]) -> None:
    rights = [product.inputs[1] for product in products]
    parts = [_parts(right) for right in rights]
    make = Inserter(graph, products[0])
    joined = [_joined(graph, values) for values in zip(*parts, strict=True)]
    dequantize = maker(rights[0])
    right = joined[0]
    if dequantize is not None:
        right = make.node("DequantizeLinear", joined, *dequantize.attributes.values())
        right.name = JOIN.join(value.name or "" for value in rights if value is not None)
    wide = make.node("MatMul", [products[0].inputs[0], right])
    wide.name, wide.type = JOIN.join(product.outputs[0].name or "" for product in products), products[0].outputs[0].type
    widths = np.array([array(values[0]).shape[-1] for values in parts], np.int64)
    sizes = make.constant(f"{wide.name}.widths", widths)
    split = ir.Node("", "Split", [wide, sizes], [ir.AttrInt64("axis", -1)], num_outputs=len(products))
    graph.insert_before(products[0], split)
    for product, part in zip(products, split.outputs, strict=True):
        take_place(product.outputs[0], part)
        graph.remove(product, safe=True)
    for right_before, values in zip(rights, parts, strict=True):
        if (old := maker(right_before)) is not None:
            graph.remove(old, safe=True)
        for value in values:
            if not value.uses():
                del graph.initializers[value.name or ""]


def _parts(right: ir.Value | None) -> list[ir.Value]:
    """The constants that a right side consists of; their last axis is that of the columns."""
    assert right is not None
    producer = right.producer()
    return [right] if producer is None else [value for value in producer.inputs if value is not None]


def _joined(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Value:
    name = JOIN.join(value.name or "" for value in values)
    return constant(graph, name, np.concatenate([array(value) for value in values], axis=-1))
