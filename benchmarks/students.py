"""Students of the benchmarks: decoder layers of a teacher."""

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel


def keep_layers(model: PreTrainedModel, count: int) -> None:
    """Keep so many decoder layers, evenly spread from the first on, in place; the configuration follows."""
    config, body = model.config, cast(Any, model.base_model)
    kept = [index * len(body.layers) // count for index in range(count)]
    body.layers = nn.ModuleList([body.layers[index] for index in kept])
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
