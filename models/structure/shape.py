"""The sizes of a student as data: read from a model, made smaller, and turned into a model again.

A budget is planned on shapes, without building a student for every idea.  A *key* names units that can be removed: an axis and the
index of a layer (0 for the hidden size, which all layers share).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedModel

from models.architecture import DecoderLayer, decoder_layers
from models.structure.edits import Edit, replay

Axis = Literal["neurons", "query_heads", "kv_groups", "layer", "hidden"]
WidthAxis = Literal["neurons", "kv_groups"]  # those that a budget may choose
Key = tuple[Axis, int]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder layer: neurons of the gated MLP, query heads (as many in every group), key/value heads."""

    neurons: int
    query_heads: int
    kv_groups: int


@dataclass(frozen=True)
class Wiring:
    """What pruning leaves as it is, but a count of parameters must know.

    Norms are counted in a layer: those over the hidden size, and those over the width of a head.
    """

    tied: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False
    norms: int = 2
    head_norms: int = 0


@dataclass(frozen=True)
class Shape:
    """Sizes of a student: channels of the residual stream, width of a head, rows of the embedding, and its layers."""

    hidden: int
    head_dim: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    wiring: Wiring = Wiring()

    def units(self, key: Key) -> int:
        """How many units there are under a key; a layer is one."""
        axis, index = key
        if axis == "hidden":
            return self.hidden
        return 1 if axis == "layer" else getattr(self.layers[index], axis)

    def keeping(self, kept: Mapping[Key, int]) -> "Shape":
        """The shape with so many units left under these keys, and all under the others.

        A layer of which 0 is left is dropped.  A key/value group takes its query heads along; query heads are counted as if all
        groups stayed: 6 of 9 heads and 2 of 3 groups leave 4 heads.
        """
        layers = []
        for index, layer in enumerate(self.layers):
            if kept.get(("layer", index), 1):
                groups = kept.get(("kv_groups", index), layer.kv_groups)
                heads = kept.get(("query_heads", index), layer.query_heads) // layer.kv_groups * groups
                layers.append(LayerShape(kept.get(("neurons", index), layer.neurons), heads, groups))
        return replace(self, hidden=kept.get(("hidden", 0), self.hidden), layers=tuple(layers))

    def evenly(self, sizes: Mapping[WidthAxis, int]) -> "Shape":
        """The shape whose layers keep at most so many units each along these axes."""
        keys: list[Key] = [(axis, index) for axis in sizes for index in range(len(self.layers))]
        return self.keeping({key: min(sizes[key[0]], self.units(key)) for key in keys})  # type: ignore[index]

    def widest(self, axis: WidthAxis) -> int:
        """Units of the layer that has most of them along an axis."""
        return max(getattr(layer, axis) for layer in self.layers)


def levels(total: int, multiple: int, least: int = 1) -> list[int]:
    """Numbers of units that may be kept, descending: all of them, then every smaller multiple that is at least `least`."""
    return [total, *range((total - 1) // multiple * multiple, max(least, multiple) - 1, -multiple)]


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a model; one on the meta device, built from a config alone, will do.

    Raises:
        ValueError: The model's family is unknown.
    """
    layers = decoder_layers(model)
    first = layers[0]
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    wiring = Wiring(
        tied=head.weight is embedding.weight,
        qkv_bias=first.queries.linear.bias is not None,
        o_bias=first.o_proj.bias is not None,
        gate_up_bias=first.gate.linear.bias is not None,
        down_bias=first.down_proj.bias is not None,
        norms=len(first.stream_norms) + len(first.output_norms),
        head_norms=sum(norm.weight.shape == (first.head_dim,) for norm in _norms(first)),
    )
    vocabulary, hidden = embedding.weight.shape
    sizes = tuple(LayerShape(layer.num_neurons, layer.num_query_heads, layer.num_kv_groups) for layer in layers)
    return Shape(hidden, first.head_dim, vocabulary, sizes, wiring)


def sliced(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """A copy of the model cut down to a shape, for measuring its speed: the first layers, and of them the first units, are kept.

    Raises:
        ValueError: Something of the shape is larger than the model.
    """
    student = copy.deepcopy(model)
    replay(student, edits_between(shape_of(model), shape))
    return student


def narrow_edit(axis: Axis, layer: int, keep: Sequence[int]) -> Edit:
    """The edit that keeps these units of a layer along one of its axes."""
    return {"op": f"narrow_{'mlp' if axis == 'neurons' else axis}", "layer": layer, "keep": list(keep)}


def edits_between(whole: Shape, part: Shape) -> list[Edit]:
    """The edits from one shape to a smaller one that keep the first layers, and of them the first units."""
    edits: list[Edit] = []
    if len(part.layers) != len(whole.layers):
        edits.append({"op": "drop_layers", "layers": list(range(len(part.layers), len(whole.layers)))})
    for index, (old, new) in enumerate(zip(whole.layers, part.layers, strict=False)):
        if new.neurons != old.neurons:
            edits.append(narrow_edit("neurons", index, range(new.neurons)))
        if new.kv_groups != old.kv_groups:
            edits.append(narrow_edit("kv_groups", index, range(new.kv_groups)))
        width, kept = old.query_heads // old.kv_groups, new.query_heads // new.kv_groups
        if kept != width:
            heads = [group * width + head for group in range(new.kv_groups) for head in range(kept)]
            edits.append(narrow_edit("query_heads", index, heads))
    if part.hidden != whole.hidden:
        edits.append({"op": "narrow_hidden", "keep": list(range(part.hidden))})
    return edits


def _norms(layer: DecoderLayer) -> list[Any]:
    """The norms inside the attention, over the width of a head."""
    linears = {id(getattr(owner, name)) for owner, name in layer.linears()}
    return [module for module in layer.attention.children() if id(module) not in linears and hasattr(module, "weight")]
