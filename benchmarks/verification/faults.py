"""Faults that an exporter could make, each planted as a small edit of a right graph: `write_beside` of export/onnx_graph/prefill.py saves it beside the original.

Whether a verification finds them is asked by `benchmarks/verification/__main__.py` on real layers, and by the tests on tiny ones.  A fault is
planted in one layer, so that the others stay right.  What is changed has to matter beyond rounding: which fault is one in which
graph is said by `PLANTED`.

Letters: B batch, T new tokens, S all tokens so far, G key/value groups, E head width, V vocabulary.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from export.onnx_graph.edits import Inserter

Fault = Callable[[ir.Model], None]
Change = Callable[[np.ndarray], np.ndarray]
LAYER = 1  # that a fault is planted in
_LAYER = rf"model\.layers\.{LAYER}\."
_CODES = r"\.weight(?!.*scale|.*zero_point).*"  # what follows a linear layer's name in its weight's
_QUERY, _DOWN = _LAYER + r"self_attn\.q_proj", _LAYER + r"mlp\.down_proj"
_FIRST_NORM, _QUERY_NORM = r"model\.layers\.0\.input_layernorm\.weight", _LAYER + r"self_attn\.q_norm\.weight"
_WEIGHT_SCALES = _DOWN + r"\.weight.*scale.*"
_FLOAT16, _BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16

# Faults of numbers ---------------------------------------------------------------------------------------------------


def _changed(pattern: str, change: Change, model: ir.Model) -> None:
    """Change an initializer; codes come as float32 numbers and are stored as codes again."""
    value = _initializer(model, pattern)
    old = value.const_value
    assert old is not None
    array = old.numpy()
    whole = array.dtype.kind == "i" and array.dtype.itemsize == 8  # indices
    new = change(array.copy() if whole else array.astype(np.float32))
    if old.dtype in (ir.DataType.INT4, ir.DataType.INT8):
        new = new.clip(-(2 ** (old.dtype.bitwidth - 1)), 2 ** (old.dtype.bitwidth - 1) - 1)
    value.const_value = ir.Tensor(new.astype(array.dtype), dtype=old.dtype, name=value.name)


def _with(pattern: str, change: Change) -> Fault:
    return partial(_changed, pattern, change)


def _first(change: Callable[[Any], Any]) -> Change:
    """A change of the first number alone."""

    def changed(x: np.ndarray) -> np.ndarray:
        x.flat[0] = change(x.flat[0])
        return x

    return changed


def _nearer_to_zero(code: Any) -> Any:
    return code + 1 if code < 0 else code - 1


def _other_sign(x_O: np.ndarray) -> np.ndarray:
    x_O[np.abs(x_O).argmax()] *= -1
    return x_O


def _changed_code(change: Change, model: ir.Model) -> None:
    """Change codes of the input that the norm before it lets through the most."""
    gains = _initializer(model, _LAYER + r"input_layernorm\.weight").const_value
    assert gains is not None
    row = int(np.abs(gains.numpy()).argmax())

    def changed(x_IO: np.ndarray) -> np.ndarray:
        x_IO[row] = change(x_IO[row])
        return x_IO

    _changed(_QUERY + _CODES, changed, model)


def _larger(x: np.ndarray) -> np.ndarray:
    return x * 1.05


def _layers_swapped(model: ir.Model) -> None:
    """The weights of two layers, each under the other one's name."""
    for name, value in list(model.graph.initializers.items()):
        other = name.replace(f"layers.{LAYER}.", f"layers.{LAYER + 1}.")
        if other != name and other in model.graph.initializers:
            theirs = model.graph.initializers[other]
            value.const_value, theirs.const_value = theirs.const_value, value.const_value
            for each in (value, theirs):
                assert each.const_value is not None
                each.const_value.name = each.name


def _rows_scale(model: ir.Model) -> None:
    """The largest code of a token is another one."""
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size == 1 and tensor.numpy() == 127.0:
            _changed(re.escape(name), lambda x: x / 1.05, model)


def _multiply(node: ir.Node, name: str, factor: float) -> None:
    node.attributes[name] = ir.AttrFloat32(name, factor * node.attributes[name].as_float())


def _interleaved(model: ir.Model) -> None:
    for node in _nodes(model, "RotaryEmbedding"):
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


# Faults of operators -------------------------------------------------------------------------------------------------


def _turned_by_one_position(heads: str, model: ir.Model) -> None:
    """Queries or keys of a layer, turned by the angles of the next position."""
    graph, positions, attention = model.graph, _input(model, "position_ids"), _attention(model)
    turned = _given(attention, 0) if heads == "queries" else _given(_maker(_given(attention, 1)), 1)
    make = Inserter(graph, graph[0])
    later = make.node("Add", [positions, make.constant("one_later", np.array(1, np.int64))])
    waiting, copies = [turned], dict[ir.Value, ir.Value]({positions: later})
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or node.op_type == "MatMul":
            continue
        for index, given in enumerate(node.inputs):
            if given is not None and (given.name or "").startswith(f"layers.{LAYER}/"):
                waiting.append(given)
            elif given is not None:
                node.replace_input_with(index, _copied(graph, given, copies))


def _copied(graph: ir.Graph, value: ir.Value, copies: dict[ir.Value, ir.Value]) -> ir.Value:
    """What a value would be if some that it is made from were others."""
    node = value.producer()
    if value not in copies and node is not None:
        inputs = [None if each is None else _copied(graph, each, copies) for each in node.inputs]
        if inputs == list(node.inputs):
            copies[value] = value
        else:
            copy = ir.Node(node.domain, node.op_type, inputs, node.attributes.values())
            graph.insert_after(node, copy)
            copies[value] = copy.outputs[0]
    return copies.get(value, value)


def _bound_of_mask(operator: str, model: ir.Model) -> None:
    """The last (`LessOrEqual`) or first token (`Greater`) that a token sees is the one behind it."""
    for node in _nodes(model, operator):
        make = Inserter(model.graph, node)
        one = make.constant("one_more", np.array(1, np.int64))
        node.replace_input_with(1, make.node("Add", [_given(node, 1), one]))


def _padding_seen(model: ir.Model) -> None:
    for use in list(_input(model, "attention_mask").uses()):
        if use.node.op_type == "Cast":
            _insert(model, use.node.outputs[0], lambda make, x: make.node("Or", [x, make.node("Not", [x])]))


def _cache_moved(kind: str, begins: tuple[int, int], model: ir.Model) -> None:
    """A cache that is given back with its first or its last token once more (or at the wrong end) before the others."""
    starts, ends = begins

    def moved(make: Inserter, present: ir.Value) -> ir.Value:
        axis = make.constant("cache_axis", np.array([2], np.int64))
        at = [make.constant(f"cache_{number}", np.array([number], np.int64)) for number in (0, starts, ends, -1)]
        first = make.node("Slice", [present, at[1], at[2], axis])
        return make.node("Concat", [first, make.node("Slice", [present, at[0], at[3], axis])], ir.AttrInt64("axis", 2))

    _returned(model, f"present.{LAYER}.{kind}", moved)


def _keys_and_values_exchanged(model: ir.Model) -> None:
    names = [f"present.{LAYER}.{kind}" for kind in ("key", "value")]
    at = [index for index, value in enumerate(model.graph.outputs) if value.name in names]
    key, value = (model.graph.outputs[index] for index in at)
    key.name, value.name = value.name, key.name
    model.graph.outputs[at[0]], model.graph.outputs[at[1]] = value, key


def _heads_of_cache(kinds: str, order: Callable[[int], list[int]], model: ir.Model) -> None:
    """New keys (and values) come from other heads."""
    attention = _attention(model)
    for index in range(1, 1 + len(kinds.split())):
        cached = _given(attention, index)
        chosen = order(_size(cached, 1))
        new = _given(_maker(cached), 1)
        _insert(model, new, lambda make, x, chosen=chosen: _gathered(make, x, chosen, axis=1))  # type: ignore[misc]


def _gate_and_up_exchanged(model: ir.Model) -> None:
    gate, up = (_product(model, f"mlp.{name}_proj").outputs[0] for name in ("gate", "up"))
    uses = [(value, list(value.uses())) for value in (gate, up)]
    for (_, places), other in zip(uses, (up, gate), strict=True):
        for use in places:
            use.node.replace_input_with(use.idx, other)
    model.graph.sort()


def _input_quantizer_left_out(model: ir.Model) -> None:
    scale = _initializer(model, _DOWN + r"\.input_quantizer\.scale")
    quantize = next(node for node in scale.consumers() if node.op_type == "QuantizeLinear")
    (dequantize,) = quantize.outputs[0].consumers()
    _insert(model, dequantize.outputs[0], lambda make, x: _given(quantize, 0))


def _leave_out(model: ir.Model, node: ir.Node) -> None:
    _insert(model, node.outputs[0], lambda make, x: _given(node, 0))


def _other_type(place: str, type: ir.DataType, model: ir.Model) -> None:
    """The residual stream, or what leaves a product inside a layer, cast to another type and back."""
    if place == "stream":
        value = _given(_norm(model, _LAYER + r"input_layernorm\.weight"), 0)
    else:
        value = _product(model, place).outputs[0]
    _cast(model, value, type, _between(model))


def _angles_in_float16(model: ir.Model) -> None:
    (product,) = _initializer(model, r".*inv_freq").consumers()
    _cast(model, product.outputs[0], _FLOAT16, ir.DataType.FLOAT)


def _cast(model: ir.Model, value: ir.Value, type: ir.DataType, back: ir.DataType) -> None:
    def cast(make: Inserter, x: ir.Value) -> ir.Value:
        return make.node("Cast", [make.node("Cast", [x], ir.AttrInt64("to", type))], ir.AttrInt64("to", back))

    _insert(model, value, cast)


def _residual_dropped(model: ir.Model) -> None:
    given = _product(model, "self_attn.o_proj").outputs[0]
    (add,) = given.consumers()
    if add.op_type == "Add":
        _insert(model, add.outputs[0], lambda make, x: given)


def _other_activation(model: ir.Model) -> None:
    """GELU, as sigmoid(1.702 x) x approximates it, in the place of SiLU."""
    sigmoid = _nodes(model, "Sigmoid")[LAYER]
    make = Inserter(model.graph, sigmoid)
    factor = make.constant("quick_gelu", np.array(1.702, _between(model).numpy()))
    sigmoid.replace_input_with(0, make.node("Mul", [_given(sigmoid, 0), factor]))


def _rows_of_head_exchanged(model: ir.Model) -> None:
    def exchanged(make: Inserter, logits: ir.Value) -> ir.Value:
        return _gathered(make, logits, [1, 0, *range(2, _size(logits, 2))], axis=2)

    _returned(model, "logits", exchanged)


def _positions_ignored(model: ir.Model) -> None:
    """Positions are counted from the first token of each call."""
    positions = _input(model, "position_ids")
    _insert(model, positions, lambda make, x: make.node("Sub", [x, _gathered(make, x, [0], axis=1)]))


def _one_scale_for_all_tokens(model: ir.Model) -> None:
    quantize = _product(model, "mlp.down_proj")
    while quantize.op_type != "QuantizeLinear":
        quantize = _maker(_given(quantize, 0))
    scale, divide = _given(quantize, 1), _given(quantize, 0).producer()
    if divide is not None and divide.op_type == "Div":  # of a product of whole numbers
        scale = _given(divide, 1)

    def largest(make: Inserter, x: ir.Value) -> ir.Value:
        return make.node("Max", [x, make.node("ReduceMax", [x], ir.AttrInt64("keepdims", 0))])

    _insert(model, scale, largest)


# All of them ---------------------------------------------------------------------------------------------------------

_LATE, _NEWEST_FIRST = (0, 1), (-1, 2**31 - 1)

FP8, INT8, INT4 = ("fp8", "fp8 half"), ("int8", "int8 cpu"), ("int4_g64", "int4_g64_zp")
FLOAT32, HALF = ("fp8", "int8", *INT4), ("fp16", "fp8 half")
MAIN = (*HALF, *FLOAT32)
PLANTED: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "a weight's scale off by 5 %": (_with(_WEIGHT_SCALES, _larger), (*FP8, *INT8, *INT4)),
    "scales of a weight's channels moved by one": (
        _with(_WEIGHT_SCALES, lambda x: np.roll(x, 1, axis=-1)),
        (*INT8, "int4_g64"),
    ),
    "an input's scale off by 5 %": (_with(_DOWN + r"\.input_quantizer\.scale", _larger), FP8),
    "a code with another sign": (partial(_changed_code, _other_sign), (*FP8, *INT8, "int4_g64")),
    "a code off by one": (partial(_changed_code, _first(_nearer_to_zero)), (*INT8, "int4_g64_zp")),
    "a zero point off by one": (_with(_QUERY + r"\.weight\.zero_point.*", _first(_nearer_to_zero)), ("int4_g64_zp",)),
    "a weight that is not a number": (_with(_DOWN + _CODES, _first(lambda x: np.nan)), ("fp16", "fp8")),
    "two layers swapped": (_layers_swapped, MAIN),
    "queries turned by one position more": (partial(_turned_by_one_position, "queries"), ("fp16", "fp8", "int4_g64")),
    "keys turned by one position more": (partial(_turned_by_one_position, "keys"), ("fp16", "fp8 half", "int8")),
    "angles for interleaved halves": (_interleaved, ("fp8", "int8")),
    "angles in float16": (_angles_in_float16, ("fp16", "fp8", "int8")),
    "a token of the future seen": (partial(_bound_of_mask, "LessOrEqual"), ("fp16", "fp8", "int4_g64", "gemma2")),
    "padding seen": (_padding_seen, ("fp16", *INT8, "gemma3_text")),
    "a window shorter by one": (partial(_bound_of_mask, "Greater"), ("gemma2", "gemma3_text")),
    "cache one position late": (partial(_cache_moved, "key", _LATE), ("fp16", "fp8", "int8 cpu", "int4_g64")),
    "cache with the newest first": (partial(_cache_moved, "value", _NEWEST_FIRST), ("fp8 half", *INT8)),
    "keys and values of the cache exchanged": (_keys_and_values_exchanged, ("fp16", "int8")),
    "a KV head repeated": (partial(_heads_of_cache, "key", lambda n: [0, 0, *range(2, n)]), ("fp16", "fp8")),
    "two KV heads exchanged": (partial(_heads_of_cache, "key value", lambda n: [1, 0, *range(2, n)]), ("int8",)),
    "gate and up exchanged": (_gate_and_up_exchanged, ("fp16", "int4_g64")),
    "a bias left out": (_with(_LAYER + r"self_attn\.q_proj\.bias", np.zeros_like), ("qwen2",)),
    "a norm of queries left out": (lambda model: _leave_out(model, _norm(model, _QUERY_NORM)), ("qwen3",)),
    "a soft cap of attention left out": (lambda model: _leave_out(model, _nodes(model, "Tanh")[LAYER]), ("gemma2",)),
    "the soft cap of logits left out": (lambda model: _leave_out(model, _nodes(model, "Tanh")[-1]), ("gemma2",)),
    "stream in float16": (partial(_other_type, "stream", _FLOAT16), FLOAT32),
    "gate in float16": (partial(_other_type, "mlp.gate_proj", _FLOAT16), ("fp8", "int8", "int4_g64")),
    "stream in bfloat16": (partial(_other_type, "stream", _BFLOAT16), HALF),
    "gate in bfloat16": (partial(_other_type, "mlp.gate_proj", _BFLOAT16), HALF),
    "a residual left out": (_residual_dropped, ("fp16", "fp8 half", "int8")),
    "another epsilon": (
        lambda model: _multiply(_norm(model, _FIRST_NORM), "epsilon", 0.1),
        ("fp8", "int8", "int4_g64"),
    ),
    "another activation": (_other_activation, ("fp16", "fp8", "int8 cpu")),
    "attention's scale off by 5 %": (
        lambda model: _multiply(_attention(model), "scale", 1.05),
        ("fp16", "fp8", "int8 cpu", "int4_g64"),
    ),
    "the last norm's weight left out": (_with(r"model\.norm\.weight", np.ones_like), ("fp16", *INT8)),
    "two rows of the head exchanged": (_rows_of_head_exchanged, ("fp16", "fp8", "int8")),
    "positions ignored": (_positions_ignored, ("fp16", "fp8 half", "int4_g64")),
    "an input's quantizer left out": (_input_quantizer_left_out, FP8),
    "one scale for all tokens": (_one_scale_for_all_tokens, INT8),
    "another largest code": (_rows_scale, INT8),
    "a cache's scale off by 5 %": (
        _with(_LAYER + r".*cache_quantizer\.key\.scale", _larger),
        ("llama, cache in int8",),
    ),
    "cosines of the next position": (_with(r"cosines\.\d+", lambda x: np.roll(x, -1, axis=0)), ("int8 cpu",)),
    "the last position but one": (_with("last_position", _first(lambda x: x - 1)), ("int8, prefill",)),
    "another label's token": (_with("label_tokens", _first(lambda x: x + 1)), ("fp16, labels",)),
}
"""By name: the fault, and the graphs of `benchmarks/verification/graphs.py` in which it is one."""


# Edits and places ----------------------------------------------------------------------------------------------------


def _insert(model: ir.Model, value: ir.Value, make: Callable[[Inserter, ir.Value], ir.Value | None]) -> None:
    """Let everything that reads a value read what is made from it."""
    uses = list(value.uses())
    if not uses:
        raise LookupError(f"expected a reader of {value.name}, found none; this fault is none in this graph")
    order = {id(node): index for index, node in enumerate(model.graph)}
    new = make(Inserter(model.graph, min((use.node for use in uses), key=lambda node: order[id(node)])), value)
    for use in uses:
        use.node.replace_input_with(use.idx, new)


def _returned(model: ir.Model, name: str, make: Callable[[Inserter, ir.Value], ir.Value]) -> None:
    """Let a graph return what is made from one of its outputs, under the same name; inside nothing changes."""
    index, value = next((index, value) for index, value in enumerate(model.graph.outputs) if value.name == name)
    last = ir.Node("", "Identity", [value])
    model.graph.append(last)
    last.replace_input_with(0, make(Inserter(model.graph, last), value))
    new = last.outputs[0]
    new.type, new.shape, value.name, new.name = value.type, value.shape, f"{name}.right", name
    model.graph.outputs[index] = new


def _gathered(make: Inserter, x: ir.Value, indices: Iterable[int], *, axis: int) -> ir.Value:
    chosen = make.constant(f"chosen.{x.name}", np.array(list(indices), np.int64))
    return make.node("Gather", [x, chosen], ir.AttrInt64("axis", axis))


def _between(model: ir.Model) -> ir.DataType:
    """The type of values between the products."""
    return _FLOAT16 if model.metadata_props["activations"] == "float16" else ir.DataType.FLOAT


def _initializer(model: ir.Model, pattern: str) -> ir.Value:
    found = [value for name, value in model.graph.initializers.items() if re.fullmatch(pattern, name)]
    if not found:
        raise LookupError(f"expected an initializer like {pattern}, found none; this fault is none in this graph")
    return found[0]


def _input(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)


def _nodes(model: ir.Model, *operators: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in operators]


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _size(value: ir.Value, axis: int) -> int:
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def _attention(model: ir.Model) -> ir.Node:
    return _nodes(model, "Attention", "GroupQueryAttention")[LAYER]


def _norm(model: ir.Model, weight: str) -> ir.Node:
    (norm,) = _initializer(model, weight).consumers()
    return norm


def _product(model: ir.Model, linear: str) -> ir.Node:
    """The product of a linear layer, by its name in the decoder layer."""
    value = _initializer(model, _LAYER + re.escape(linear) + _CODES)
    while True:
        (node,) = value.consumers()
        if node.op_type.startswith("MatMul"):
            return node
        value = node.outputs[0]
