"""Faults that an exporter could make, each planted as a small edit of a right graph: `export/prefill.write_beside` saves it beside the original.

Whether a verification finds them is asked by `benchmarks/verification/__main__.py` on real layers, and by the tests on tiny ones.  A fault is
planted in one layer, so that the others stay right.  What is changed has to matter beyond rounding: which fault is one in which
graph is said by `PLANTED`.

Letters: B batch, T new tokens, S all tokens so far, G key/value groups, E head width, V vocabulary.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import onnx_ir as ir

from export.onnx_graph.edits import Inserter

Fault = Callable[[ir.Model], None]
LAYER = 1  # that a fault is planted in
_CODES = r"\.weight(?!.*scale|.*zero_point).*"  # what follows a linear layer's name in its weight's
_QUERY, _DOWN = (rf"model\.layers\.{LAYER}\.{name}_proj" for name in (r"self_attn\.q", r"mlp\.down"))
_FLOAT16, _BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def _scale(pattern: str, factor: float, model: ir.Model) -> None:
    _change(_initializer(model, pattern), lambda x: x * factor)


def _sign_of_a_code(model: ir.Model) -> None:
    """The largest weight of the input that the norm before it lets through the most."""
    row = _strongest_input(model)

    def flipped(x_IO: np.ndarray) -> np.ndarray:
        x_IO[row, np.abs(x_IO[row]).argmax()] *= -1
        return x_IO

    _change(_initializer(model, _QUERY + _CODES), flipped)


def _code_by_one_step(model: ir.Model) -> None:
    row = _strongest_input(model)

    def moved(x_IO: np.ndarray) -> np.ndarray:
        x_IO[row, 0] += 1 if x_IO[row, 0] < 0 else -1
        return x_IO

    _change(_initializer(model, _QUERY + _CODES), moved)


def _strongest_input(model: ir.Model) -> int:
    gains = _initializer(model, rf"model\.layers\.{LAYER}\.input_layernorm\.weight").const_value
    assert gains is not None
    return int(np.abs(gains.numpy()).argmax())


def _zero_point(model: ir.Model) -> None:
    def moved(x: np.ndarray) -> np.ndarray:
        x.flat[0] += 1 if x.flat[0] < 0 else -1
        return x

    _change(_initializer(model, _QUERY + r"\.weight\.zero_point.*"), moved)


def _channels_scales(model: ir.Model) -> None:
    _change(_initializer(model, _DOWN + r"\.weight.*scale.*"), lambda x: np.roll(x, 1, axis=-1))


def _nan(model: ir.Model) -> None:
    def broken(x: np.ndarray) -> np.ndarray:
        x.flat[0] = np.nan
        return x

    _change(_initializer(model, _DOWN + _CODES), broken)


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


def _turned_by_one_position(heads: str, model: ir.Model) -> None:
    """Queries or keys of a layer, turned by the angles of the next position."""
    graph, positions = model.graph, _input(model, "position_ids")
    attention = _attention(model)
    turned = attention.inputs[0]
    if heads == "keys":
        cached = attention.inputs[1]
        assert cached is not None
        turned = _maker(cached).inputs[1]
    make = Inserter(graph, graph[0])
    later = make.node("Add", [positions, make.constant("one_later", np.array(1, np.int64))])
    waiting, copies = [turned], dict[ir.Value, ir.Value]({positions: later})
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is None or node.op_type == "MatMul":
            continue
        for index, name in enumerate(node.inputs):
            if name is None:
                continue
            if (name.name or "").startswith(f"layers.{LAYER}/"):
                waiting.append(name)
            else:
                node.replace_input_with(index, _copied(graph, name, copies))


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
    for node in [node for node in model.graph if node.op_type == operator]:
        make = Inserter(model.graph, node)
        bound = node.inputs[1]
        node.replace_input_with(1, make.node("Add", [bound, make.constant("one_more", np.array(1, np.int64))]))


def _padding_seen(model: ir.Model) -> None:
    mask = _input(model, "attention_mask")
    casts = [use.node for use in mask.uses() if use.node.op_type == "Cast"]
    for cast in casts:
        _insert(model, cast.outputs[0], lambda make, x: make.node("Or", [x, make.node("Not", [x])]))


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
    for cached in _attention(model).inputs[1 : 1 + len(kinds.split())]:
        assert cached is not None
        new = _maker(cached).inputs[1]
        assert new is not None
        assert cached.shape is not None
        heads = cached.shape[1]
        assert isinstance(heads, int)
        chosen = order(heads)
        _insert(model, new, lambda make, x, chosen=chosen: _gathered(make, x, chosen, axis=1))  # type: ignore[misc]


def _gate_and_up_exchanged(model: ir.Model) -> None:
    gate, up = (_product(model, f"mlp.{name}_proj").outputs[0] for name in ("gate", "up"))
    uses = [(value, list(value.uses())) for value in (gate, up)]
    for (_, places), other in zip(uses, (up, gate), strict=True):
        for use in places:
            use.node.replace_input_with(use.idx, other)
    model.graph.sort()


def _bias_left_out(model: ir.Model) -> None:
    _change(_initializer(model, rf"model\.layers\.{LAYER}\.self_attn\.q_proj\.bias"), np.zeros_like)


def _norm_left_out(model: ir.Model) -> None:
    norm = _norm(model, rf"model\.layers\.{LAYER}\.self_attn\.q_norm\.weight")
    _insert(model, norm.outputs[0], lambda make, x: norm.inputs[0])


def _soft_cap_left_out(which: int, model: ir.Model) -> None:
    caps = [node for node in model.graph if node.op_type == "Tanh"]
    _insert(model, caps[which].outputs[0], lambda make, x: caps[which].inputs[0])


def _other_type(place: str, type: ir.DataType, model: ir.Model) -> None:
    """The residual stream, or what leaves a product inside a layer, cast to another type and back."""
    if place == "stream":
        value = _norm(model, rf"model\.layers\.{LAYER}\.input_layernorm\.weight").inputs[0]
    else:
        value = _product(model, place).outputs[0]
    assert value is not None
    back = _between(model)

    def cast(make: Inserter, x: ir.Value) -> ir.Value:
        return make.node("Cast", [make.node("Cast", [x], ir.AttrInt64("to", type))], ir.AttrInt64("to", back))

    _insert(model, value, cast)


def _angles_in_float16(model: ir.Model) -> None:
    frequencies = _initializer(model, r".*inv_freq")
    (product,) = frequencies.consumers()

    def cast(make: Inserter, x: ir.Value) -> ir.Value:
        half = make.node("Cast", [x], ir.AttrInt64("to", _FLOAT16))
        return make.node("Cast", [half], ir.AttrInt64("to", ir.DataType.FLOAT))

    _insert(model, product.outputs[0], cast)


def _residual_dropped(model: ir.Model) -> None:
    given = _product(model, "self_attn.o_proj").outputs[0]
    (add,) = given.consumers()
    if add.op_type == "Add":
        _insert(model, add.outputs[0], lambda make, x: given)


def _other_epsilon(model: ir.Model) -> None:
    norm = _norm(model, r"model\.layers\.0\.input_layernorm\.weight")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float() / 10)


def _other_activation(model: ir.Model) -> None:
    """GELU, as sigmoid(1.702 x) x approximates it, in the place of SiLU."""
    sigmoids = [node for node in model.graph if node.op_type == "Sigmoid"]
    x = sigmoids[LAYER].inputs[0]
    make = Inserter(model.graph, sigmoids[LAYER])
    factor = make.constant("quick_gelu", np.array(1.702, _between(model).numpy()))
    sigmoids[LAYER].replace_input_with(0, make.node("Mul", [x, factor]))


def _attention_scale(model: ir.Model) -> None:
    attention = _attention(model)
    attention.attributes["scale"] = ir.AttrFloat32("scale", 1.05 * attention.attributes["scale"].as_float())


def _interleaved(model: ir.Model) -> None:
    for node in [node for node in model.graph if node.op_type == "RotaryEmbedding"]:
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def _rows_of_head_exchanged(model: ir.Model) -> None:
    def exchanged(make: Inserter, logits: ir.Value) -> ir.Value:
        assert logits.shape is not None
        size = logits.shape[-1]
        assert isinstance(size, int)
        return _gathered(make, logits, [1, 0, *range(2, size)], axis=2)

    _returned(model, "logits", exchanged)


def _positions_ignored(model: ir.Model) -> None:
    """Positions are counted from the first token of each call."""
    _insert(
        model,
        _input(model, "position_ids"),
        lambda make, x: make.node("Sub", [x, _gathered(make, x, [0], axis=1)]),
    )


def _input_quantizer_left_out(model: ir.Model) -> None:
    scale = _initializer(model, _DOWN + r"\.input_quantizer\.scale")
    quantize = next(node for node in scale.consumers() if node.op_type == "QuantizeLinear")
    (dequantize,) = quantize.outputs[0].consumers()
    _insert(model, dequantize.outputs[0], lambda make, x: quantize.inputs[0])


def _one_scale_for_all_tokens(model: ir.Model) -> None:
    value = _product(model, "mlp.down_proj").inputs[0]
    while value is not None and _maker(value).op_type != "QuantizeLinear":
        value = _maker(value).inputs[0]
    assert value is not None
    quantize = _maker(value)
    scale = quantize.inputs[1]
    divided = quantize.inputs[0]
    if divided is not None and _maker(divided).op_type == "Div":  # of a product of whole numbers
        scale = _maker(divided).inputs[1]
    assert scale is not None

    def largest(make: Inserter, x: ir.Value) -> ir.Value:
        return make.node("Max", [x, make.node("ReduceMax", [x], ir.AttrInt64("keepdims", 0))])

    _insert(model, scale, largest)


def _rows_scale(model: ir.Model) -> None:
    """The largest code of a token is another one."""
    found = [value for value in model.graph.initializers.values() if _is_number(value, 127.0)]
    for value in found:
        _change(value, lambda x: x / 1.05)


def _rotary_table(model: ir.Model) -> None:
    """The cosines of the next position; sines stay."""
    _change(_initializer(model, r"cosines\.\d+"), lambda x: np.roll(x, -1, axis=0))


def _constant_moved(name: str, by: int, model: ir.Model) -> None:
    def moved(x: np.ndarray) -> np.ndarray:
        x.flat[0] += by
        return x

    _change(_initializer(model, name), moved)


def _final_norm_without_weight(model: ir.Model) -> None:
    _change(_initializer(model, r"model\.norm\.weight"), np.ones_like)


WEIGHT_SCALE = partial(_scale, _DOWN + r"\.weight.*scale.*", 1.05)
INPUT_SCALE = partial(_scale, _DOWN + r"\.input_quantizer\.scale", 1.05)
CACHE_SCALE = partial(_scale, rf"model\.layers\.{LAYER}\..*cache_quantizer\.key\.scale", 1.05)
SEEN_LATER = partial(_bound_of_mask, "LessOrEqual")
_LATE, _NEWEST_FIRST = (0, 1), (-1, 2**31 - 1)

FLOAT32 = ("fp8", "int8", "int4_g64", "int4_g64_zp")
HALF = ("fp16", "fp8 half")
MAIN = (*HALF, *FLOAT32)
PLANTED: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "a weight's scale off by 5 %": (WEIGHT_SCALE, ("fp8", "fp8 half", "int8", "int8 cpu", "int4_g64", "int4_g64_zp")),
    "scales of a weight's channels moved by one": (_channels_scales, ("int8", "int8 cpu", "int4_g64")),
    "an input's scale off by 5 %": (INPUT_SCALE, ("fp8", "fp8 half")),
    "a code with another sign": (_sign_of_a_code, ("fp8", "fp8 half", "int8", "int8 cpu", "int4_g64")),
    "a code off by one": (_code_by_one_step, ("int8", "int8 cpu", "int4_g64_zp")),
    "a zero point off by one": (_zero_point, ("int4_g64_zp",)),
    "a weight that is not a number": (_nan, ("fp16", "fp8")),
    "two layers swapped": (_layers_swapped, MAIN),
    "queries turned by one position more": (partial(_turned_by_one_position, "queries"), ("fp16", "fp8", "int4_g64")),
    "keys turned by one position more": (partial(_turned_by_one_position, "keys"), ("fp16", "fp8 half", "int8")),
    "angles for interleaved halves": (_interleaved, ("fp8", "int8")),
    "angles in float16": (_angles_in_float16, ("fp16", "fp8", "int8")),
    "a token of the future seen": (SEEN_LATER, ("fp16", "fp8", "int4_g64", "gemma2")),
    "padding seen": (_padding_seen, ("fp16", "int8", "int8 cpu", "gemma3_text")),
    "a window shorter by one": (partial(_bound_of_mask, "Greater"), ("gemma2", "gemma3_text")),
    "cache one position late": (partial(_cache_moved, "key", _LATE), ("fp16", "fp8", "int8 cpu", "int4_g64")),
    "cache with the newest first": (partial(_cache_moved, "value", _NEWEST_FIRST), ("fp8 half", "int8", "int8 cpu")),
    "keys and values of the cache exchanged": (_keys_and_values_exchanged, ("fp16", "int8")),
    "a KV head repeated": (partial(_heads_of_cache, "key", lambda n: [0, 0, *range(2, n)]), ("fp16", "fp8")),
    "two KV heads exchanged": (partial(_heads_of_cache, "key value", lambda n: [1, 0, *range(2, n)]), ("int8",)),
    "gate and up exchanged": (_gate_and_up_exchanged, ("fp16", "int4_g64")),
    "a bias left out": (_bias_left_out, ("qwen2",)),
    "a norm of queries left out": (_norm_left_out, ("qwen3",)),
    "a soft cap of attention left out": (partial(_soft_cap_left_out, LAYER), ("gemma2",)),
    "the soft cap of logits left out": (partial(_soft_cap_left_out, -1), ("gemma2",)),
    "stream in float16": (partial(_other_type, "stream", _FLOAT16), FLOAT32),
    "gate in float16": (partial(_other_type, "mlp.gate_proj", _FLOAT16), ("fp8", "int8", "int4_g64")),
    "stream in bfloat16": (partial(_other_type, "stream", _BFLOAT16), HALF),
    "gate in bfloat16": (partial(_other_type, "mlp.gate_proj", _BFLOAT16), HALF),
    "a residual left out": (_residual_dropped, ("fp16", "fp8 half", "int8")),
    "another epsilon": (_other_epsilon, ("fp8", "int8", "int4_g64")),
    "another activation": (_other_activation, ("fp16", "fp8", "int8 cpu")),
    "attention's scale off by 5 %": (_attention_scale, ("fp16", "fp8", "int8 cpu", "int4_g64")),
    "the last norm's weight left out": (_final_norm_without_weight, ("fp16", "int8", "int8 cpu")),
    "two rows of the head exchanged": (_rows_of_head_exchanged, ("fp16", "fp8", "int8")),
    "positions ignored": (_positions_ignored, ("fp16", "fp8 half", "int4_g64")),
    "an input's quantizer left out": (_input_quantizer_left_out, ("fp8", "fp8 half")),
    "one scale for all tokens": (_one_scale_for_all_tokens, ("int8", "int8 cpu")),
    "another largest code": (_rows_scale, ("int8", "int8 cpu")),
    "a cache's scale off by 5 %": (CACHE_SCALE, ("llama, cache in int8",)),
    "cosines of the next position": (_rotary_table, ("int8 cpu",)),
    "the last position but one": (partial(_constant_moved, "last_position", -1), ("int8, prefill",)),
    "another label's token": (partial(_constant_moved, "label_tokens", 1), ("fp16, labels",)),
}
"""By name: the fault, and the graphs of `benchmarks/verification/__main__.py` in which it is one."""


def _insert(model: ir.Model, value: ir.Value, make: Callable[[Inserter, ir.Value], ir.Value | None]) -> None:
    """Let everything that reads a value read what is made from it."""
    uses = list(value.uses())
    if not uses:
        raise LookupError(
            f"expected {value.name} to be read by some node, found none; this fault is none in this graph"
        )
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


def _change(value: ir.Value, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change an initializer; codes come as float32 numbers and are stored as codes again."""
    old = value.const_value
    assert old is not None
    array = old.numpy()
    whole = array.dtype.kind == "i" and array.dtype.itemsize == 8  # indices
    new = change(array.copy() if whole else array.astype(np.float32))
    if old.dtype in (ir.DataType.INT4, ir.DataType.INT8):
        new = new.clip(-(2 ** (old.dtype.bitwidth - 1)), 2 ** (old.dtype.bitwidth - 1) - 1)
    value.const_value = ir.Tensor(new.astype(array.dtype), dtype=old.dtype, name=value.name)


def _between(model: ir.Model) -> ir.DataType:
    """The type of values between the products."""
    return _FLOAT16 if model.metadata_props["activations"] == "float16" else ir.DataType.FLOAT


def _initializer(model: ir.Model, pattern: str) -> ir.Value:
    found = [value for name, value in model.graph.initializers.items() if re.fullmatch(pattern, name)]
    if not found:
        raise LookupError(f"expected an initializer like {pattern}, found none; this fault is none in this graph")
    return found[0]


def _is_number(value: ir.Value, number: float) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size == 1 and tensor.numpy() == number


def _input(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _attention(model: ir.Model) -> ir.Node:
    return [node for node in model.graph if node.op_type in ("Attention", "GroupQueryAttention")][LAYER]


def _norm(model: ir.Model, weight: str) -> ir.Node:
    (norm,) = _initializer(model, weight).consumers()
    return norm


def _product(model: ir.Model, linear: str) -> ir.Node:
    """The product of a linear layer, by its name in the decoder layer."""
    value = _initializer(model, rf"model\.layers\.{LAYER}\.{re.escape(linear)}" + _CODES)
    while True:
        (node,) = value.consumers()
        if node.op_type.startswith("MatMul"):
            return node
        value = node.outputs[0]
