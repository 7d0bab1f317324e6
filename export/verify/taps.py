"""Taps on the inputs and outputs of a graph's matrix products, and a version of the graph that is fed with torch's values there.

Every product with a weight is a place where graph and torch model meet: the weight's name says which linear layer it belongs to.
In the *fed* graph each product reads what entered that layer in torch, and returns two things: the value that the graph itself would
have read (`entering`), and the result of the product (`products`).  So each comparison covers a few operators only.  Errors do
not grow from layer to layer, and no difference is carried across a rounding decision of a quantizer, which is fed as well: in
front of it stands torch's own value.  All operators, quantizers included, are still the file's own.

A graph of `export.cpu_graph.to_cpu` has joined products and products of whole numbers; they are found in the same way.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from export.onnx_graph.metadata import metadata_of, read_graph

FED = ".fed"
_CACHE_SCALE = re.compile(r"(.*\.cache_quantizer\.(?:key|value))\.scale$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_BEHIND_WEIGHT = {"Cast", "DequantizeLinear", "Transpose"}


@dataclass(frozen=True)
class Entrance:
    """A value that linear layers (or a quantizer of keys or values) read.

    Attributes:
        value: Its name in the graph.
        module: One of the modules that read it, by its name in torch.
        rows: Whether the graph holds it as rows (B * T, I).
    """

    value: str
    module: str
    rows: bool = False


@dataclass(frozen=True)
class Product:
    """A matrix product without its bias.

    Attributes:
        value: Name of the result in the graph.
        modules: The linear layers whose weights it multiplies with, side by side, by their names in torch.
        start: First column of these layers' joined outputs that it computes.
        size: Number of columns; None: all.
    """

    value: str
    modules: tuple[str, ...]
    start: int = 0
    size: int | None = None


@dataclass(frozen=True)
class FedGraph:
    """See the module's docstring.

    Attributes:
        model: The graph, without weights: they stay in the file that it refers to.
        entrances: An input `{value}.fed` of the graph for each.
        compared: Names of the entrances' values that are outputs.
        products: All of them are outputs.
        half: Whether values between the products are float16.
        last_only: Whether the head reads the last position only.
    """

    model: onnx.ModelProto
    entrances: list[Entrance]
    compared: set[str]
    products: list[Product]
    half: bool
    last_only: bool


def fed_graph(path: Path, layers: Iterable[int] | None = None) -> FedGraph:
    """Feed a graph in front of every product with a weight.

    Args:
        path: A file of `export_onnx`, or made from one.
        layers: Decoder layers to compute, without the head; None: all, and the head.  Nothing else is left in the graph, and what a layer
            would read from the layers before it is not compared.
    """
    model = read_graph(path)
    graph = _Graph(model.graph)
    entrances, products = graph.taps()
    if layers is not None:
        wanted = set(layers)
        entrances = [entrance for entrance in entrances if layer_of(entrance.module) in wanted]
        products = [product for product in products if layer_of(product.modules[0]) in wanted]
    metadata = metadata_of(model)
    half = metadata["activations"] == "float16"
    element = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    graph.feed({entrance.value for entrance in entrances}, element)
    if layers is None:
        compared = [entrance.value for entrance in entrances]
        kept = [value.name for value in model.graph.output]
    else:
        compared = [entrance.value for entrance in entrances if not graph.reads_other_layers(entrance)]
        kept = [value.name for value in model.graph.output if _cache_layer(value.name) in wanted]
    graph.return_only(dict.fromkeys([*kept, *compared, *(product.value for product in products)]), element)
    inputs = {value.name for value in model.graph.input}
    entrances = [entrance for entrance in entrances if entrance.value + FED in inputs]
    return FedGraph(model, entrances, set(compared), products, half, "labels" in metadata or "logits" in metadata)


def coarser_types(fed: FedGraph) -> list[str]:
    """Types below the one that a graph says it has between its products, to which it casts.

    One rounding to bfloat16 is eight times one to float16: too close for a bound on distances.
    """
    types = onnx.TensorProto
    casts = [node for node in fed.model.graph.node if node.op_type == "Cast"]
    found = {attribute.i for node in casts for attribute in node.attribute if attribute.name == "to"}
    coarser = {types.BFLOAT16} if fed.half else {types.BFLOAT16, types.FLOAT16}
    return sorted(types.DataType.Name(each) for each in found & coarser)


def layer_of(module: str) -> int | None:
    """The decoder layer that a module is part of; None: none."""
    found = _LAYER.search(module)
    return int(found[1]) if found else None


def _cache_layer(output: str) -> int | None:
    parts = output.split(".")
    return int(parts[1]) if parts[0] == "present" else None


class _Graph:
    """A graph with an index of who makes each value."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.makers = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self._weights = {id(node): names for node in graph.node if (names := self._weight_of(node)) is not None}

    def taps(self) -> tuple[list[Entrance], list[Product]]:
        """All places, each value once."""
        entrances: dict[str, Entrance] = {}
        products = []
        stored = {value.name for value in self.graph.output}  # a cache of codes, whose new entries were rounded before
        for node in self.graph.node:
            if id(node) in self._weights:
                modules, start, size = self._weights[id(node)]
                value, rows = self._entering(node)
                entrances.setdefault(value, Entrance(value, modules[0], rows))
                products.append(Product(self._leaving(node), modules, start, size))
            elif (
                node.op_type == "QuantizeLinear"
                and node.output[0] not in stored
                and (scale := _CACHE_SCALE.match(node.input[1]))
            ):
                entrances.setdefault(node.input[0], Entrance(node.input[0], scale[1]))
        return list(entrances.values()), products

    def feed(self, values: set[str], element: int) -> None:
        """Let everything that reads these values read an input in their place."""
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                if name in values:
                    node.input[index] = name + FED
        self.graph.input.extend(
            onnx.helper.make_tensor_value_info(name + FED, element, None) for name in sorted(values)
        )

    def reads_other_layers(self, entrance: Entrance) -> bool:
        """Whether a value, in the fed graph, depends on products of another decoder layer."""
        layer = layer_of(entrance.module)
        made = self._made_from([entrance.value])
        return any(layer_of(self._weights[id(node)][0][0]) != layer for node in made if id(node) in self._weights)

    def return_only(self, names: Iterable[str], element: int) -> None:
        """Make these values the outputs, and leave nothing in the graph that they do not need."""
        outputs = {value.name: value for value in self.graph.output}
        wanted = [outputs.get(name) or onnx.helper.make_tensor_value_info(name, element, None) for name in names]
        del self.graph.output[:]
        self.graph.output.extend(wanted)
        needed = {id(node) for node in self._made_from([value.name for value in wanted])}
        _keep(self.graph.node, lambda node: id(node) in needed)
        read = {name for node in self.graph.node for name in node.input}
        _keep(self.graph.input, lambda value: value.name in read)
        _keep(self.graph.initializer, lambda tensor: tensor.name in read)

    def _made_from(self, names: Iterable[str]) -> Iterator[onnx.NodeProto]:
        """Every node that these values depend on."""
        waiting, seen = list(names), set()
        while waiting:
            node = self.makers.get(waiting.pop())
            if node is not None and id(node) not in seen:
                seen.add(id(node))
                waiting.extend(node.input)
                yield node

    def _weight_of(self, node: onnx.NodeProto) -> tuple[tuple[str, ...], int, int | None] | None:
        """The layers whose weight is the right side of a product, the first column and how many; None: no such product."""
        if node.op_type not in ("MatMul", "MatMulIntegerToFloat"):
            return None
        name = node.input[1]
        while name not in self.constants:
            maker = self.makers.get(name)
            if maker is None or maker.op_type not in _BEHIND_WEIGHT:
                return None
            name = maker.input[0]
        if ".weight" not in name:
            return None
        modules = tuple(_module(part) for part in name.split("+"))
        part = re.search(r"\.(\d+)\.codes$", name)
        return (modules, int(part[1]), self.constants[name].dims[1]) if part else (modules, 0, None)

    def _entering(self, product: onnx.NodeProto) -> tuple[str, bool]:
        """What enters a product's left side, in front of its quantizer, and whether as rows."""
        left = product.input[0]
        if product.op_type == "MatMulIntegerToFloat":
            left = self.makers[left].input[0]
            scaled = self.makers.get(left)
            return (scaled.input[0] if scaled is not None and scaled.op_type == "Div" else left), False
        reshape = self.makers.get(left)
        rows = reshape is not None and reshape.op_type == "Reshape"
        dequantize = self.makers.get(reshape.input[0]) if rows and reshape is not None else reshape
        quantize = (
            self.makers.get(dequantize.input[0]) if dequantize and dequantize.op_type == "DequantizeLinear" else None
        )
        if quantize is None or quantize.op_type != "QuantizeLinear":
            return left, False
        return quantize.input[0], rows

    def _leaving(self, product: onnx.NodeProto) -> str:
        """The result of a product; one of whole numbers may have the scale of its rows still to come."""
        value = product.output[0]
        if product.op_type == "MatMulIntegerToFloat" and product.input[2] == "rows.one":
            value = next(node.output[0] for node in self.graph.node if node.op_type == "Mul" and node.input[0] == value)
        return str(value)


def _module(weight: str) -> str:
    """The linear layer that a weight belongs to; a head that is tied to the embedding may go by its name."""
    module = weight.partition(".weight")[0]
    return "lm_head" if module.endswith("embed_tokens") else module


def _keep(field: Any, wanted: Callable[[Any], bool]) -> None:
    """Leave only some entries in a repeated field."""
    kept = [entry for entry in field if wanted(entry)]
    del field[:]
    field.extend(kept)
