"""What every cut is measured against: the dense model with the same units held at zero."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import decoder_layers
from models.structure.edits import Edit
from tests.helpers.tiny import tiny_batch, tiny_model

# Of a model that `cut_model` makes: 3 layers of 48 neurons and 8 heads on 4 groups, 32 channels.
CUTS: dict[str, Edit] = {
    "neurons": {"op": "narrow_mlp", "layer": 1, "keep": sorted({0, 3, *range(10, 40, 2)})},
    "groups": {"op": "narrow_kv_groups", "layer": 0, "keep": [0, 1, 3]},
    "one group": {"op": "narrow_kv_groups", "layer": 2, "keep": [2]},
    "heads": {"op": "narrow_query_heads", "layer": 1, "keep": [1, 2, 5, 6]},
    "channels": {"op": "narrow_hidden", "keep": sorted({0, 1, 2, *range(5, 31, 2), *range(6, 22, 2)})},
    "layer": {"op": "drop_layers", "layers": [1]},
    "layers": {"op": "drop_layers", "layers": [0, 2]},
}


def cut_model(family: str, **settings: object) -> PreTrainedModel:
    """Three layers, eight heads on four groups, and heads wider than hidden size over heads."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "num_hidden_layers": 3}
    return tiny_model(family, **(sizes | settings))


def logits(model: PreTrainedModel, batch: Batch | None = None) -> Tensor:
    """Logits at all positions that are no padding."""
    batch = batch or tiny_batch()
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return output[batch["attention_mask"].bool()]


def masked_logits(model: PreTrainedModel, edit: Edit) -> Tensor:
    """Logits of the dense model with zeros for what an edit cuts away."""
    layers = decoder_layers(model)
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    if edit["op"] == "narrow_mlp":
        layer = layers[edit["layer"]]
        inputs[layer.down_proj] = _mask(edit["keep"], layer.num_neurons)
    elif edit["op"] in ("narrow_kv_groups", "narrow_query_heads"):
        layer = layers[edit["layer"]]
        units = layer.num_kv_groups if edit["op"] == "narrow_kv_groups" else layer.num_query_heads
        inputs[layer.o_proj] = _mask(edit["keep"], units).repeat_interleave(layer.o_proj.weight.shape[1] // units)
    elif edit["op"] == "narrow_hidden":
        embedding = model.get_input_embeddings()
        writers = [embedding, *(p for layer in layers for p in (layer.o_proj, layer.down_proj))]
        outputs.update(dict.fromkeys(writers, _mask(edit["keep"], embedding.weight.shape[1])))
    else:
        gone = [layers[index] for index in edit["layers"]]
        outputs.update(dict.fromkeys([p for layer in gone for p in (layer.o_proj, layer.down_proj)], torch.zeros(())))
    return _logits_with(model, inputs, outputs)


def close(a: Tensor, b: Tensor) -> None:
    """Equal in float32, up to the order of sums."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _logits_with(model: PreTrainedModel, inputs: Mapping[Any, Tensor], outputs: Mapping[Any, Tensor]) -> Tensor:
    hooks = [m.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)) for m, mask in inputs.items()]
    hooks += [m.register_forward_hook(lambda _, args, out, mask=mask: out * mask) for m, mask in outputs.items()]
    result = logits(model)
    for hook in hooks:
        hook.remove()
    return result


def _mask(keep: list[int], size: int) -> Tensor:
    mask = torch.zeros(size)
    mask[keep] = 1
    return mask
