"""Models of a few decoder layers, cut out of a model.

What costs time in an export grows with the number of layers, and layers of the same kind differ in nothing but their weights.
"""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from models.architecture import DecoderLayer, decoder_layers
from models.copies import shared_copy


def slice_layers(model: PreTrainedModel, indices: list[int]) -> PreTrainedModel:
    """A model of the given decoder layers only, with everything around them; it *shares* all tensors with `model`."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(indices)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in indices]
    part = shared_copy(model, config)
    part.model.layers = nn.ModuleList(part.model.layers[index] for index in indices)
    for position, layer in enumerate(part.model.layers):
        layer.self_attn.layer_idx = position
    return part.eval()


def layer_kinds(model: PreTrainedModel) -> list[tuple[Any, ...]]:
    """What decides the shape of each layer's graph: its sizes, its quantized projections and its kind of attention."""
    types = getattr(model.config, "layer_types", None)

    def kind(layer: DecoderLayer) -> tuple[Any, ...]:
        quantized = tuple(getattr(getattr(owner, name), "format", None) for owner, name in layer.linears())
        sizes = (layer.num_neurons, layer.num_kv_groups, layer.num_query_heads)
        return (*sizes, quantized, types[layer.index] if types else None)

    return [kind(layer) for layer in decoder_layers(model)]
