"""Structure is data: every change to a student's modules is an *edit*, a JSON-able dict in an ordered list.

The module saves its list in the checkpoint and replays it before the weights load.  Resume, `validate`,
`load_from_checkpoint` and export all rebuild a student through `replay`, and through nothing else.

| op                 | fields                                | effect                                                          |
|--------------------|---------------------------------------|-----------------------------------------------------------------|
| `narrow_mlp`       | `layer`, `keep` (neurons)             | keeps these neurons of a gated MLP                              |
| `narrow_kv_groups` | `layer`, `keep` (key/value groups)    | keeps these groups of an attention, with their query heads      |
| `fake_quantize`    | `format`, `modules` (qualified names) | linear layers become `FakeQuantizedLinear`, observing at first  |
| `lora`             | `rank`, `alpha`, `dropout`, `modules` | adapters beside these projections; all else is frozen           |
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from models.architecture import DecoderLayer, decoder_layers
from models.lora import has_adapters, insert_adapters
from models.pruning.slicing import group_indices, narrow_linear
from models.quantization.linear import FakeQuantizedLinear

Edit = dict[str, Any]
QUANTIZATION_FORMATS = ("fp8_e4m3",)


def apply_edit(model: PreTrainedModel, edit: Edit, optimizers: Sequence[Optimizer] = ()) -> None:
    """Apply one edit to a model in place, and to the optimizer state of the parameters it shrinks.

    Raises:
        ValueError: Unknown op, a layer or module that does not exist, or indices outside the layer.
    """
    if edit.get("op") not in _OPERATIONS:
        raise ValueError(
            f"expected an edit with an 'op' among {', '.join(_OPERATIONS)}, found {edit.get('op')!r}; "
            "the checkpoint may come from a newer version of Potstill"
        )
    if has_adapters(model) and edit["op"] != "lora":
        raise ValueError(
            f"expected a student without LoRA adapters for {edit['op']}, found one that has them; prune or quantize the "
            "student/ folder of the LoRA run instead"
        )
    _OPERATIONS[edit["op"]](model, edit, optimizers)


def replay(model: PreTrainedModel, edits: Sequence[Edit]) -> None:
    """Apply an ordered list of edits to a freshly built model."""
    for edit in edits:
        apply_edit(model, edit)


def quantize_decoder(model: PreTrainedModel, format: str = "fp8_e4m3") -> Edit:
    """The edit that fake-quantizes every projection of every decoder layer; embeddings, head and norms are left alone."""
    owners = {id(owner): name for name, owner in model.named_modules()}
    names = [f"{owners[id(owner)]}.{child}" for layer in decoder_layers(model) for owner, child in layer.linears()]
    return {"op": "fake_quantize", "format": format, "modules": names}


def is_uniform(model: PreTrainedModel) -> bool:
    """Whether all decoder layers have the same sizes, as one `config.json` can express."""
    return (
        len({(layer.num_neurons, layer.num_kv_groups, layer.num_query_heads) for layer in decoder_layers(model)}) == 1
    )


def _narrow_mlp(model: PreTrainedModel, edit: Edit, optimizers: Sequence[Optimizer]) -> None:
    layer = _checked_layer(model, edit)
    keep = _checked_indices(edit, layer.num_neurons)
    narrow_linear(layer.mlp.gate_proj, keep, 0, optimizers)
    narrow_linear(layer.mlp.up_proj, keep, 0, optimizers)
    narrow_linear(layer.mlp.down_proj, keep, 1, optimizers)
    layer.mlp.intermediate_size = len(keep)
    _sync_config(model)


def _narrow_kv_groups(model: PreTrainedModel, edit: Edit, optimizers: Sequence[Optimizer]) -> None:
    layer = _checked_layer(model, edit)
    groups = _checked_indices(edit, layer.num_kv_groups)
    queries_per_group = layer.num_query_heads // layer.num_kv_groups
    kv_rows = group_indices(groups, layer.head_dim)
    query_rows = group_indices(groups, queries_per_group * layer.head_dim)
    narrow_linear(layer.attention.q_proj, query_rows, 0, optimizers)
    narrow_linear(layer.attention.k_proj, kv_rows, 0, optimizers)
    narrow_linear(layer.attention.v_proj, kv_rows, 0, optimizers)
    narrow_linear(layer.attention.o_proj, query_rows, 1, optimizers)
    _sync_config(model)


def _fake_quantize(model: PreTrainedModel, edit: Edit, optimizers: Sequence[Optimizer]) -> None:
    if edit["format"] not in QUANTIZATION_FORMATS:
        raise ValueError(
            f"expected a quantization format among {', '.join(QUANTIZATION_FORMATS)}, found {edit['format']!r}; "
            "choose one of these"
        )
    modules = dict(model.named_modules())
    for name in edit["modules"]:
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(
                f"expected linear layers to quantize, found {name!r}, which is {_kind(modules.get(name))} in this model; "
                "list each linear layer once, by its name in the model"
            )
    for name in edit["modules"]:
        parent, _, child = name.rpartition(".")
        linear = FakeQuantizedLinear(modules[name])  # type: ignore[arg-type]  # checked above
        setattr(modules[parent], child, linear.to(linear.weight.device))


def _lora(model: PreTrainedModel, edit: Edit, optimizers: Sequence[Optimizer]) -> None:
    insert_adapters(model, edit["modules"], rank=edit["rank"], alpha=edit["alpha"], dropout=edit["dropout"])


_OPERATIONS: dict[str, Callable[[PreTrainedModel, Edit, Sequence[Optimizer]], None]] = {
    "narrow_mlp": _narrow_mlp,
    "narrow_kv_groups": _narrow_kv_groups,
    "fake_quantize": _fake_quantize,
    "lora": _lora,
}


def _kind(module: nn.Module | None) -> str:
    return "no module" if module is None else f"a {type(module).__name__}"


def _checked_layer(model: PreTrainedModel, edit: Edit) -> DecoderLayer:
    layers = decoder_layers(model)
    if not 0 <= edit["layer"] < len(layers):
        raise ValueError(
            f"expected a layer from 0 to {len(layers) - 1}, found {edit['layer']}; this model may not be the one whose "
            "student was edited"
        )
    return layers[edit["layer"]]


def _checked_indices(edit: Edit, size: int) -> torch.Tensor:
    keep = torch.tensor(edit["keep"], dtype=torch.long)
    if len(keep) == 0 or keep.min() < 0 or keep.max() >= size or len(keep.unique()) != len(keep):
        raise ValueError(
            f"expected {edit['op']} to keep between 1 and {size} distinct indices below {size} in layer {edit['layer']}, "
            f"found {len(keep)} with the extremes {edit['keep'][:1]} and {edit['keep'][-1:]}; lower the sparsity"
        )
    return keep


def _sync_config(model: PreTrainedModel) -> None:
    """Keep `config` true: the sizes of the layers if they agree, else the largest (and `is_uniform` is False)."""
    layers = decoder_layers(model)
    model.config.head_dim = layers[0].head_dim
    model.config.intermediate_size = max(layer.num_neurons for layer in layers)
    model.config.num_attention_heads = max(layer.num_query_heads for layer in layers)
    model.config.num_key_value_heads = max(layer.num_kv_groups for layer in layers)
