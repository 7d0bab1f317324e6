"""Sizes that modules and config store beside the weights: updated from their shapes after every cut.

Most of it only has to be true.  Some of it is read in `forward`: how often keys and values are repeated, and, where one linear
layer stacks queries, keys and values, how many of its outputs are queries.
"""

from typing import Any

from transformers import PreTrainedModel

from models.architecture import DecoderLayer, decoder_layers


class LayerConfig:
    """A model's config as one attention sees it: its own number of query heads, all else as in the model's.

    It refers to the model's config instead of copying it, so what is set there (the attention implementation) is seen here.
    """

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self.config = config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        """Ask the model's config; never for what Python's own protocols look up (copying makes objects without a config)."""
        if name == "config" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.config, name)


def sync_config(model: PreTrainedModel) -> None:
    """Make modules and config say what the weights' shapes are; where layers differ, the config has the largest sizes."""
    layers, config = decoder_layers(model), model.config
    embedding: Any = model.get_input_embeddings()
    hidden = embedding.weight.shape[1]
    embedding.embedding_dim = hidden
    config.hidden_size = hidden
    config.num_hidden_layers = len(layers)
    config.head_dim = layers[0].head_dim
    config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = map(
        max, zip(*(_sizes(layer) for layer in layers), strict=True)
    )
    for layer in layers:
        neurons, heads, groups = _sizes(layer)
        _remember(layer.block, hidden_size=hidden)
        _remember(layer.mlp, hidden_size=hidden, intermediate_size=neurons)
        _remember(layer.attention, num_key_value_groups=heads // groups, num_key_value_heads=groups)
        if len(layer.family.qkv) == 1:
            layer.attention.config = LayerConfig(config, heads)


def _sizes(layer: DecoderLayer) -> tuple[int, int, int]:
    return layer.num_neurons, layer.num_query_heads, layer.num_kv_groups


def _remember(module: Any, **sizes: int) -> None:
    """Set the attributes that the module has."""
    for name, size in sizes.items():
        if hasattr(module, name):
            setattr(module, name, size)
