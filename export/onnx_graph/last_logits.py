"""Logits of the last position only, which is all that continuing a prompt needs.

The head multiplies every position of a prompt with the whole vocabulary: for a small model and a long prompt a fifth of the time to the
first token, and a tensor of (tokens x vocabulary) numbers.  Either a graph never does so and has logits (B, 1, V), or its caller says how
many of the last positions to keep, each time.  Prompts have to be padded on the left, as everywhere here, so that the last position is a
token in every row.
"""

import numpy as np
import onnx_ir as ir

from export.onnx_graph.edits import Inserter, maker

LOGITS_TO_KEEP = "logits_to_keep"  # as transformers calls it
_TO_THE_END = np.array([np.iinfo(np.int64).max])
_BEHIND_PRODUCT = {"Add", "Cast", "Div", "Mul", "Tanh"}  # scales of an integer product, a soft cap (Gemma 2), casts
_BEFORE_PRODUCT = {"DequantizeLinear", "Div", "QuantizeLinear"}


def keep_last_logits(model: ir.Model) -> None:
    """Feed the head of a graph, in place, with the last position only, before or after other passes.

    Raises:
        ValueError: The graph's output `logits` does not come from a matrix product.
    """
    logits, hidden, uses, make = _head(model.graph)
    index = make.constant("last_position", np.array([-1], np.int64))
    _feed(uses, make.node("Gather", [hidden, index], ir.AttrInt64("axis", 1)), hidden)
    assert logits.shape is not None
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])


def ask_for_logits(model: ir.Model) -> None:
    """Give a graph, in place, an input `logits_to_keep`, int64 (1,): how many of the last positions the head sees.

    Who does not feed it gets 0, which is all of them: ONNX calls that an input with a default.

    Raises:
        ValueError: As `keep_last_logits`.
    """
    graph = model.graph
    _, hidden, uses, make = _head(graph)
    keep = make.constant(LOGITS_TO_KEEP, np.array([0], np.int64))
    graph.inputs.append(keep)
    ends, axes = make.constant("to_the_end", _TO_THE_END), make.constant("axis_of_tokens", np.array([1], np.int64))
    _feed(uses, make.node("Slice", [hidden, make.node("Neg", [keep]), ends, axes]), hidden)


def _head(graph: ir.Graph) -> tuple[ir.Value, ir.Value, list[tuple[ir.Node, int]], Inserter]:
    """The logits, what the head reads (all positions) and where, and a hand that puts nodes in front of it."""
    logits = next(value for value in graph.outputs if value.name == "logits")
    product = _first_other(logits, _BEHIND_PRODUCT)
    if product is None or product.op_type not in ("MatMul", "MatMulIntegerToFloat"):
        raise ValueError(
            f"expected logits from a matrix product, found {None if product is None else product.op_type}; export the model with "
            "`export.onnx_graph.to_onnx`"
        )
    hidden = product.inputs[0]
    assert hidden is not None
    norm = _first_other(hidden, _BEFORE_PRODUCT)
    if norm is not None:
        hidden = next(value for value in norm.outputs if value.uses())
    uses = [(use.node, use.idx) for use in hidden.uses()]
    return logits, hidden, uses, Inserter(graph, min((node for node, _ in uses), key=list(graph).index))


def _feed(uses: list[tuple[ir.Node, int]], some: ir.Value, hidden: ir.Value) -> None:
    some.name, some.type = f"{hidden.name}.last", hidden.type
    for node, index in uses:
        node.replace_input_with(index, some)


def _first_other(value: ir.Value, operators: set[str]) -> ir.Node | None:
    """The first maker of a value, then of its first input, and so on, that is none of these operators."""
    node = value.producer()
    while node is not None and node.op_type in operators:
        node = maker(node.inputs[0])
    return node
