"""Cutting units of a decoder layer, and whole layers: neurons, key/value groups, query heads, depth.

Every function changes the model in place: the same `Parameter` objects, optimizer states included, and a config that tells the
truth.  It checks everything before it changes anything.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from models.architecture import DecoderLayer, Part, decoder_layers
from models.structure.sizes import sync_config
from models.structure.slicing import checked_indices, drop_parameters, group_indices, narrow_linear

Optimizers = Sequence[Optimizer]


def narrow_mlp(model: PreTrainedModel, optimizers: Optimizers = (), *, layer: int, keep: Sequence[int]) -> None:
    """Keep these neurons of a layer's gated MLP, ascending indices.

    Raises:
        ValueError: There is no such layer or no such neuron.
    """
    view = _layer(model, layer)
    neurons = checked_indices(keep, view.num_neurons, f"narrow_mlp to keep neurons of layer {layer}")
    _narrow_outputs([(view.gate, neurons), (view.up, neurons)], optimizers)
    narrow_linear(view.down_proj, neurons, 1, optimizers)
    sync_config(model)


def narrow_kv_groups(model: PreTrainedModel, optimizers: Optimizers = (), *, layer: int, keep: Sequence[int]) -> None:
    """Keep these key/value groups of a layer's attention with all their query heads, ascending indices.

    Raises:
        ValueError: There is no such layer or no such group.
    """
    view = _layer(model, layer)
    groups = checked_indices(keep, view.num_kv_groups, f"narrow_kv_groups to keep key/value groups of layer {layer}")
    heads = group_indices(groups, view.num_query_heads // view.num_kv_groups)
    _narrow_heads(view, heads, groups, optimizers)
    sync_config(model)


def narrow_query_heads(model: PreTrainedModel, optimizers: Optimizers = (), *, layer: int, keep: Sequence[int]) -> None:
    """Keep these query heads of a layer's attention, ascending, numbered over the layer; as many in every group.

    Raises:
        ValueError: There is no such layer or no such head, or groups would have different numbers of heads.
    """
    view = _layer(model, layer)
    groups = view.num_kv_groups
    heads = checked_indices(keep, view.num_query_heads, f"narrow_query_heads to keep query heads of layer {layer}")
    counts = torch.bincount(heads // (view.num_query_heads // groups), minlength=groups).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"expected narrow_query_heads to keep equally many heads in each of the {groups} groups of layer {layer}, found "
            f"{counts}; choose the heads within each group"
        )
    _narrow_heads(view, heads, torch.arange(groups), optimizers)
    sync_config(model)


def drop_layers(model: PreTrainedModel, optimizers: Optimizers = (), *, layers: Sequence[int]) -> None:
    """Remove these decoder layers, ascending indices; the others move up, and keep their kind of attention.

    Raises:
        ValueError: There is no such layer, or none would be left.
    """
    views = decoder_layers(model)
    gone = set(checked_indices(layers, len(views), "drop_layers to remove decoder layers").tolist())
    if len(gone) == len(views):
        raise ValueError(f"expected drop_layers to leave a decoder layer, found all {len(gone)} listed; list fewer")
    drop_parameters([parameter for index in gone for parameter in views[index].block.parameters()], optimizers)
    for index in sorted(gone, reverse=True):
        del model.model.layers[index]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for index, kind in enumerate(model.config.layer_types) if index not in gone]
    for view in decoder_layers(model):
        for module in (view.block, view.attention):
            if hasattr(module, "layer_idx"):
                module.layer_idx = view.index
    sync_config(model)


def _layer(model: PreTrainedModel, index: int) -> DecoderLayer:
    layers = decoder_layers(model)
    if not 0 <= index < len(layers):
        raise ValueError(
            f"expected a layer from 0 to {len(layers) - 1}, found {index}; this model may not be the one whose "
            "student was edited"
        )
    return layers[index]


def _narrow_heads(view: DecoderLayer, heads: Tensor, groups: Tensor, optimizers: Optimizers) -> None:
    query_rows, kv_rows = group_indices(heads, view.head_dim), group_indices(groups, view.head_dim)
    _narrow_outputs([(view.queries, query_rows), (view.keys, kv_rows), (view.values, kv_rows)], optimizers)
    narrow_linear(view.o_proj, query_rows, 1, optimizers)


def _narrow_outputs(kept: Iterable[tuple[Part, Tensor]], optimizers: Optimizers) -> None:
    """Keep the given outputs of each part; the parts of one linear layer in one slice."""
    outputs: dict[torch.nn.Module, list[Tensor]] = {}
    for part, indices in kept:
        outputs.setdefault(part.linear, []).append(part.start + indices)
    for linear, pieces in outputs.items():
        narrow_linear(linear, torch.cat(pieces), 0, optimizers)
