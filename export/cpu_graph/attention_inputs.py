"""Further inputs of attention with its cache inside: lengths, a bias for padding, tables of rotary angles.

All attentions of a graph share them; each is made when the first one needs it.

Letters: B batch, T new tokens, P past, S = P + T, L positions, E head width.
"""

import numpy as np
import onnx_ir as ir
import onnxruntime

from export.onnx_graph.edits import Inserter

_FEW = 8  # positions, whose angles must be the same whether they come alone or with all others
_LOWEST = np.float32(-1e30)  # what a masked score gets; the exponent of nothing else comes near


class AttentionInputs:
    """The shared inputs of one graph."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._positions = int(model.metadata_props.get("positions", 0))
        self._lengths: tuple[ir.Value, ir.Value] | None = None
        self._biases: dict[ir.Value, ir.Value] = {}
        self._tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}

    def lengths(self, make: Inserter) -> tuple[ir.Value, ir.Value]:
        """See `_lengths`."""
        self._lengths = self._lengths or _lengths(make)
        return self._lengths

    def bias(self, make: Inserter, mask: ir.Value) -> ir.Value:
        """What is added to the scores for a mask; the operator leaves out later tokens itself, so that padding alone may be left."""
        if mask not in self._biases:
            choices = make.constant("unmasked", np.float32(0)), make.constant("masked", _LOWEST)
            if _has_window(mask):
                self._biases[mask] = make.node("Where", [mask, *choices])
            else:
                self._biases[mask] = _bias_of_padding(make, choices)
        return self._biases[mask]

    def tables(self, make: Inserter, query: ir.Value, key: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """Cosines and sines (L, E / 2) if both are turned, whole heads, by angles that a table can hold."""
        angles = _angles_of_whole_heads(query)
        if angles is None or angles != _angles_of_whole_heads(key):
            return None
        cos, sin = angles
        if (cos, sin) not in self._tables:
            found = angle_tables(self._graph, cos, sin, self._positions) if self._positions else None
            number = len(self._tables)
            self._tables[cos, sin] = found and (
                make.constant(f"cosines.{number}", found[0]),
                make.constant(f"sines.{number}", found[1]),
            )
        return self._tables[cos, sin]


def _angles_of_whole_heads(turned: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Cosines and sines of every token, if a value comes out of RotaryEmbedding over halves of whole heads."""
    node = turned.producer()
    if node is None or node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) != 3:
        return None
    settings = [node.attributes.get(name) for name in ("interleaved", "rotary_embedding_dim")]
    _, cos, sin = node.inputs
    if cos is None or sin is None or any(setting is not None and setting.as_int() for setting in settings):
        return None
    return cos, sin


def _lengths(make: Inserter) -> tuple[ir.Value, ir.Value]:
    """S - 1 for every row (B,), and S, both int32: left padding counts as tokens here, the mask takes them out."""
    mask_BS = next(value for value in make.graph.inputs if value.name == "attention_mask")
    total_1 = make.node("Shape", [mask_BS], ir.AttrInt64("start", 1), ir.AttrInt64("end", 2))
    batch_1 = make.node("Shape", [mask_BS], ir.AttrInt64("start", 0), ir.AttrInt64("end", 1))
    to_int32 = ir.AttrInt64("to", ir.DataType.INT32)
    last_1 = make.node("Sub", [total_1, make.constant("one", np.array([1], np.int64))])
    last_B = make.node("Expand", [make.node("Cast", [last_1], to_int32), batch_1])
    return last_B, make.node("Cast", [make.node("Squeeze", [total_1])], to_int32)


def _has_window(mask: ir.Value) -> bool:
    """Whether a mask compares positions with the end of a window, too."""
    makers, behind = [mask.producer()], set()
    while makers:
        maker = makers.pop()
        if maker is not None and maker not in behind:
            behind.add(maker)
            makers += [value.producer() for value in maker.inputs if value is not None]
    return any(maker.op_type == "Greater" for maker in behind)


def _bias_of_padding(make: Inserter, choices: tuple[ir.Value, ir.Value]) -> ir.Value:
    """(B, 1, T, S): the same for every new token."""
    inputs = {value.name: value for value in make.graph.inputs}
    seen_BS = make.node("Cast", [inputs["attention_mask"]], ir.AttrInt64("to", ir.DataType.BOOL))
    bias_B11S = make.node(
        "Unsqueeze",
        [make.node("Where", [seen_BS, *choices]), make.constant("heads_and_tokens", np.array([1, 2], np.int64))],
    )
    new_1 = make.node("Shape", [inputs["input_ids"]], ir.AttrInt64("start", 1), ir.AttrInt64("end", 2))
    one_1 = make.constant("one", np.array([1], np.int64))
    shape_4 = make.node("Concat", [one_1, one_1, new_1, one_1], ir.AttrInt64("axis", 0))
    return make.node("Expand", [bias_B11S, shape_4])


def angle_tables(graph: ir.Graph, cos: ir.Value, sin: ir.Value, positions: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Cosines and sines (L, E / 2) of all positions, as a graph computes its `cos` and `sin` from `position_ids`.

    None if the angles depend on more than their own position (frequencies that change with the length).
    """
    position_ids = next(value for value in graph.inputs if value.name == "position_ids")
    try:
        part = ir.convenience.extract(graph, [position_ids], [cos, sin])
    except ValueError:
        return None
    model = ir.to_proto(ir.Model(part, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    all_of_them, few = (
        [table[0] for table in session.run(None, {"position_ids": np.arange(length)[None]})]
        for length in (positions, _FEW)
    )
    if not all(np.array_equal(whole[:_FEW], start) for whole, start in zip(all_of_them, few, strict=True)):
        return None
    return all_of_them[0], all_of_them[1]
