"""Logits of the last position only, which is all that continuing a prompt needs.

The head multiplies every position of a prompt with the whole vocabulary: for a small model and a long prompt a fifth of the time to the
first token, and a tensor of (tokens x vocabulary) numbers.  The graph that comes out has logits (B, 1, V).  Prompts have to be padded on
the left, as everywhere here, so that the last position is a token in every row.
"""

import numpy as np
import onnx_ir as ir

from export.graph_edits import Inserter

_BEHIND_PRODUCT = {"Add", "Cast", "Div", "Mul", "Tanh"}  # scales of an integer product, a soft cap (Gemma 2), casts
_BEFORE_PRODUCT = {"DequantizeLinear", "Div", "QuantizeLinear"}


def keep_last_logits(model: ir.Model) -> None:
    """Feed the head of a graph, in place, with the last position only.

    Args:
        model: Graph from `export.to_onnx`, before or after other passes.

    Raises:
        ValueError: The graph's output `logits` does not come from a matrix product.
    """
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    hidden, uses = _hidden(logits)
    make = Inserter(graph, min((node for node, _ in uses), key=list(graph).index))
    last = make.node(
        "Gather", [hidden, make.constant("last_position", np.array([-1], np.int64))], ir.AttrInt64("axis", 1)
    )
    last.name, last.type = f"{hidden.name}.last", hidden.type
    for node, index in uses:
        node.replace_input_with(index, last)
    assert logits.shape is not None
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])


def _hidden(logits: ir.Value) -> tuple[ir.Value, list[tuple[ir.Node, int]]]:
    """What the head reads, all positions of it, and where."""
    product = _first_other(logits, _BEHIND_PRODUCT)
    if product is None or product.op_type not in ("MatMul", "MatMulIntegerToFloat"):
        raise ValueError(
            f"expected logits from a matrix product, found {None if product is None else product.op_type}; export the model with "
            "`export.to_onnx`"
        )
    hidden = product.inputs[0]
    assert hidden is not None
    norm = _first_other(hidden, _BEFORE_PRODUCT)
    if norm is not None:
        hidden = next(value for value in norm.outputs if value.uses())
    return hidden, [(use.node, use.idx) for use in hidden.uses()]


def _first_other(value: ir.Value, operators: set[str]) -> ir.Node | None:
    """The first maker of a value, then of its first input, and so on, that is none of these operators."""
    node = value.producer()
    while node is not None and node.op_type in operators:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node
