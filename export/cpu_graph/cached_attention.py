"""Attention with its cache inside: ONNX Runtime's GroupQueryAttention in place of the operators that surround Attention in a trace.

An exported layer splits heads off, turns axes around, appends to the cache by Concat, and puts the heads together again: seventeen
operators that compute nothing and copy the whole cache for every token.  GroupQueryAttention takes queries, keys and values as the
projections leave them and appends in place, if the session binds one buffer as past and as present (see
`export/sessions/shared_cache.py`); with different tensors it copies, as before.

It also turns queries and keys by their rotary angles, from tables that hold what the graph computes, and by the place in the cache
instead of `position_ids`: behind padding on the left, all tokens of a row are turned further by the same angle, which attention does
not see.  Without a table (angles that change with the length) or with norms in between, the graph turns them as before.  The mask,
with padding and windows, stays the graph's own.

Only ONNX Runtime knows the operator (domain com.microsoft), so this is for graphs that run there.

Letters: B batch, T new tokens, P past, S = P + T, L positions, H query heads, G key/value groups, E head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.cpu_graph.attention_inputs import AttentionInputs
from export.onnx_graph.edits import Inserter, maker, take_place

DOMAIN = "com.microsoft"
_TURN_HEADS = (0, 2, 1, 3)
_CODES = (  # of a cache of 8 bits
    ir.AttrInt64("kv_cache_bit_width", 8),
    ir.AttrString("k_quant_type", "PER_TENSOR"),
    ir.AttrString("v_quant_type", "PER_TENSOR"),
)


def cache_in_attention(model: ir.Model) -> int:
    """Replace, in place, every fused attention over a cache in a float32 graph; returns how many there were.

    A cache of INT8 codes stays one.  Others stay: below opset 23, with soft caps (Gemma 2), without rotary angles (which name the
    number of heads).
    """
    graph, shared = model.graph, AttentionInputs(model)
    replaced = 0
    for node in list(graph):
        if node.op_type != "Attention" or node.domain or len(node.inputs) < 4:
            continue
        query, seen_keys, seen_values, mask = node.inputs[:4]
        keys, values = _Cache.behind(seen_keys), _Cache.behind(seen_values)
        joined, num_heads = _joined_heads(node), _num_heads(query)
        if query is None or mask is None or keys is None or values is None or joined is None or num_heads is None:
            continue
        make = Inserter(graph, node)
        tables = shared.tables(make, query, keys.new)
        heads = [query, keys.new, values.new]
        if tables:  # attention turns queries and keys
            heads[:2] = [_before_angles(head) for head in heads[:2]]
        scales = [cache.scale for cache in (keys, values) if cache.scale is not None]
        attention = ir.Node(
            DOMAIN,
            "GroupQueryAttention",
            [
                *_together([_flat(make, head) for head in heads]),
                *(keys.past, values.past),
                *shared.lengths(make),
                *(tables or (None, None)),
                *(None, shared.bias(make, mask)),
                *([None, *scales] if scales else []),
            ],
            [
                *_attributes(node, num_heads, keys.past),
                *([ir.AttrInt64("do_rotary", 1)] if tables else []),
                *(_CODES if scales else ()),
            ],
            num_outputs=3,
            name=node.name,
        )
        graph.insert_before(node, attention)
        for old, by in zip((joined, keys.present, values.present), attention.outputs, strict=True):
            take_place(old, by)
        replaced += 1
    if replaced:
        graph.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
    return replaced


def _before_angles(turned: ir.Value) -> ir.Value:
    rotary = maker(turned)
    assert rotary is not None
    assert rotary.inputs[0] is not None
    return rotary.inputs[0]


def _together(parts: Sequence[ir.Value]) -> list[ir.Value | None]:
    """Query, key and value as the operator takes them: the one product that they were split from, if nothing lies between."""
    splits = {part.producer() for part in parts}
    split = splits.pop()
    if splits or split is None or split.op_type != "Split" or list(split.outputs) != list(parts):
        return list(parts)
    return [split.inputs[0], None, None]


@dataclass(frozen=True)
class _Cache:
    """Keys or values on their way into attention: new ones (B, G, T, E) appended to past ones; with a scale, both are INT8 codes."""

    past: ir.Value
    new: ir.Value
    present: ir.Value
    scale: ir.Value | None = None

    @classmethod
    def behind(cls, seen: ir.Value | None) -> "_Cache | None":
        """What attention sees, taken apart; None if it is anything else."""
        node = maker(seen)
        if node is not None and node.op_type == "DequantizeLinear":
            codes, scale = node.inputs[:2]
            found = cls.behind(codes)
            quantize = None if found is None else maker(found.new)
            if found is None or quantize is None or quantize.inputs[0] is None:
                return None
            return replace(found, new=quantize.inputs[0], scale=scale)
        if node is None or node.op_type != "Concat":
            return None
        past, new = node.inputs
        assert past is not None
        assert new is not None
        return cls(past, new, node.outputs[0])


def _flat(make: Inserter, heads: ir.Value | None) -> ir.Value:
    """(B, T, heads * E) from (B, heads, T, E): the tensor that the heads were split from, or the way back to one."""
    node = maker(heads)
    if node is not None and node.op_type == "RotaryEmbedding" and len(node.inputs) == 3:
        x, *angles = node.inputs
        return make.node("RotaryEmbedding", [_flat(make, x), *angles], *node.attributes.values())
    if node is not None and _turns_heads(node):
        split = maker(node.inputs[0])
        if split is not None and split.op_type == "Reshape" and split.inputs[0] is not None:
            return split.inputs[0]
    turned = make.node("Transpose", [heads], ir.AttrInt64s("perm", _TURN_HEADS))
    return make.node("Reshape", [turned, make.constant("heads_together", np.array([0, 0, -1], np.int64))])


def _attributes(attention: ir.Node, num_heads: int, past_key: ir.Value) -> list[ir.Attr]:
    assert past_key.shape is not None
    groups = past_key.shape[1]
    assert isinstance(groups, int)
    kept = [attention.attributes[name] for name in ("scale", "softcap") if name in attention.attributes]
    return [ir.AttrInt64("num_heads", num_heads), ir.AttrInt64("kv_num_heads", groups), *kept]


def _num_heads(rotated: ir.Value | None) -> int | None:
    """Heads of a tensor behind rotary angles; None behind anything else."""
    node = maker(rotated)
    attribute = None if node is None else node.attributes.get("num_heads")
    return None if attribute is None else attribute.as_int()


def _turns_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == _TURN_HEADS


def _joined_heads(attention: ir.Node) -> ir.Value | None:
    """The result of attention with its heads together again, (B, T, H * E), as traces compute it; None: not so."""
    value, turned = attention.outputs[0], False
    while len(value.uses()) == 1:
        (node,) = value.consumers()
        if node.op_type == "Reshape" and turned:
            return node.outputs[0]
        if not (node.op_type == "Reshape" or _turns_heads(node)):
            return None
        turned |= _turns_heads(node)
        value = node.outputs[0]
    return None
