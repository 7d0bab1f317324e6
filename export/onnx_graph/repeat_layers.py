"""Repeating the traced decoder layers to the full depth of the model.

A `Trace` holds one decoder layer of each kind.  The exporter notes on every node which module it came from, so the nodes of a
layer are known exactly (optimizations may put in a node without a note: it belongs to its inputs).  What they take from outside
is the hidden state, the layer's own cache and weights (renamed in each copy), and values that do not depend on the layer, such as
the mask and the rotary angles (computed once for all).
"""

import re
from collections.abc import Callable, Iterable

import onnx_ir as ir

from export.onnx_graph.trace import Trace, cache_names

_SCOPES = "pkg.torch.onnx.name_scopes"
_LAYER_SCOPE = re.compile(r"'[\w.]*model\.layers\.(\d+)'")
_OF_A_LAYER = re.compile(r"^(past_key_values|present|model\.layers)\.(\d+)(?=\.)")


def repeat_layers(trace: Trace) -> ir.Model:
    """Unroll a trace to full depth.

    Returns:
        A new model with `len(trace.slots)` decoder layers.  Its parameters are still inputs: see `export/onnx_graph/bind_weights.py`.
    """
    parts = _Parts(trace)
    copy = _Copy(trace.slots)
    copy.nodes_of(parts.before)
    hidden = copy.values[parts.entries[0]]
    for layer, slot in enumerate(trace.slots):
        copy.values[parts.entries[slot]] = hidden
        copy.nodes_of(parts.layers[slot], layer)
        hidden = copy.values[parts.exits[slot]]
    copy.values[parts.exits[-1]] = hidden
    copy.nodes_of(parts.after)

    data = ["input_ids", "attention_mask", "position_ids", *cache_names("past_key_values", len(trace.slots))]
    outputs = ["logits", *cache_names("present", len(trace.slots))]
    graph = ir.Graph(
        [copy.inputs[name] for name in [*data, *(name for name in copy.inputs if name not in data)]],
        [copy.outputs[name] for name in outputs],
        nodes=copy.nodes,
        initializers=list(copy.initializers.values()),
        opset_imports=dict(trace.model.graph.opset_imports),
        name="potstill",
    )
    return ir.Model(graph, ir_version=trace.model.ir_version, producer_name="potstill")


class _Parts:
    """A trace's nodes, sorted into what comes before the layers, each layer, and what comes after them."""

    def __init__(self, trace: Trace) -> None:
        self.before: list[ir.Node] = []
        self.layers: list[list[ir.Node]] = [[] for _ in range(trace.num_slots)]
        self.after: list[ir.Node] = []
        self.entries: list[ir.Value] = []
        self.exits: list[ir.Value] = []
        varying = {value for value in trace.model.graph.inputs if _OF_A_LAYER.match(value.name or "")}
        behind: set[ir.Value] = set()
        for node in trace.model.graph:
            layer = self._layer_of(node)
            if varying.intersection(node.inputs) and not _is_shape_of_cache(node):
                varying.update(node.outputs)
            if layer is not None and varying.intersection(node.outputs):
                self.layers[layer].append(node)
                behind.update(node.outputs)
            elif behind.intersection(node.inputs):
                self.after.append(node)
                behind.update(node.outputs)
            else:
                self.before.append(node)
                if "embed_tokens'" in node.metadata_props.get(_SCOPES, ""):
                    self.entries = [node.outputs[0]]
                    varying.add(node.outputs[0])
        for nodes in self.layers:
            self.exits.append(_single_exit(nodes))
        self.entries += self.exits[:-1]

    def _layer_of(self, node: ir.Node) -> int | None:
        if _SCOPES in node.metadata_props:
            scope = _LAYER_SCOPE.search(node.metadata_props[_SCOPES])
            return int(scope[1]) if scope else None
        makers = {value.producer() for value in node.inputs if value is not None}
        return next((layer for layer, nodes in enumerate(self.layers) if makers.intersection(nodes)), None)


def _is_shape_of_cache(node: ir.Node) -> bool:
    """Every layer's cache has the same batch and length, so one layer's can stand for all (their widths are constants)."""
    return node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].is_graph_input()


def _single_exit(nodes: list[ir.Node]) -> ir.Value:
    """The one value that a layer hands on: its hidden state."""
    inside = set(nodes)
    handed_on = [
        value for node in nodes for value in node.outputs if any(use.node not in inside for use in value.uses())
    ]
    assert len(handed_on) == 1, f"a decoder layer hands on {[value.name for value in handed_on]}"
    return handed_on[0]


class _Copy:
    """The growing copy of a graph.

    Attributes:
        values: For each original value, its latest copy.
        inputs, initializers, outputs: Copied values by name.
        nodes: Copied nodes in order.
    """

    def __init__(self, slots: list[int]) -> None:
        self._slots = slots
        self.values: dict[ir.Value, ir.Value] = {}
        self.inputs: dict[str, ir.Value] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.outputs: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []

    def nodes_of(self, nodes: Iterable[ir.Node], layer: int | None = None) -> None:
        """Append copies of nodes; those of a decoder layer get the cache and weights of the given layer."""
        for node in nodes:
            copied = ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else self._value(value, layer) for value in node.inputs],
                node.attributes.values(),
                num_outputs=len(node.outputs),
                name=None if layer is None else f"layers.{layer}/{node.name}",
            )
            for old, new in zip(node.outputs, copied.outputs, strict=True):
                new.name = _renamed(old.name or "", layer)
                new.type = old.type
                self.values[old] = new
                if old.is_graph_output():
                    new.shape = old.shape
                    self.outputs[new.name] = new
            self.nodes.append(copied)

    def _value(self, value: ir.Value, layer: int | None) -> ir.Value:
        if value.is_initializer():
            return self._named(self.initializers, value, value.name or "")
        if value.is_graph_input():
            return self._named(self.inputs, value, _OF_A_LAYER.sub(self._layer_name(layer), value.name or ""))
        return self.values[value]

    def _layer_name(self, layer: int | None) -> Callable[[re.Match[str]], str]:
        """What a traced layer's name becomes; outside the layers it stands for the first layer of its kind."""
        return lambda match: f"{match[1]}.{self._slots.index(int(match[2])) if layer is None else layer}"

    @staticmethod
    def _named(known: dict[str, ir.Value], value: ir.Value, name: str) -> ir.Value:
        if name not in known:
            known[name] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
        return known[name]


def _renamed(name: str, layer: int | None) -> str:
    if layer is None:
        return name
    if _OF_A_LAYER.match(name):
        return _OF_A_LAYER.sub(lambda match: f"{match[1]}.{layer}", name)
    return f"layers.{layer}/{name}"
