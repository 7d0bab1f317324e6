"""What surgery and quantization must know about a model family: where the decoder layers are and how they are wired.

Everything else in Potstill talks to a model through plain Hugging Face calls.  A `Decoder` is a *view*: it owns nothing, and
it is built anew whenever it is needed, so that it can never disagree with the modules it describes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# Families whose decoder layers have `mlp.{gate,up,down}_proj` and `self_attn.{q,k,v,o}_proj`, no logit scale and no soft cap.
SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class DecoderLayer:
    """One transformer block: a gated MLP and grouped-query attention.

    Attributes:
        index: Position of the block, from 0.
        mlp: Module with `gate_proj`, `up_proj` (hidden -> neurons) and `down_proj` (neurons -> hidden).
        attention: Module with `q_proj`, `k_proj`, `v_proj` and `o_proj`.
        head_dim: Width of one head; `q_proj` has `heads * head_dim` outputs, `k_proj` and `v_proj` `groups * head_dim`.
    """

    index: int
    mlp: Any
    attention: Any
    head_dim: int

    @property
    def num_neurons(self) -> int:
        """Neurons of the gated MLP."""
        return self.mlp.down_proj.weight.shape[1]

    @property
    def num_kv_groups(self) -> int:
        """Key/value heads; each serves a group of query heads."""
        return self.attention.k_proj.weight.shape[0] // self.head_dim

    @property
    def num_query_heads(self) -> int:
        """Query heads."""
        return self.attention.q_proj.weight.shape[0] // self.head_dim

    def linears(self) -> Iterator[tuple[nn.Module, str]]:
        """The layer's projections as (owner, attribute name), in the order in which data meets them."""
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield self.attention, name
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield self.mlp, name


def check_family(config: PretrainedConfig) -> None:
    """Raise `ValueError` if pruning, quantization or export do not know this family."""
    if config.model_type not in SUPPORTED_FAMILIES:
        raise ValueError(
            f"expected a model of one of the families {', '.join(SUPPORTED_FAMILIES)}, found model_type "
            f"{config.model_type!r}; choose such a model, or describe the new family in models/architecture.py "
            "(decoder layers, gated MLP, attention projections)"
        )


def decoder_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """The decoder layers of a supported Hugging Face causal language model.

    Raises:
        ValueError: The model's family is not one of `SUPPORTED_FAMILIES`.
    """
    check_family(model.config)
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    return [
        DecoderLayer(index=index, mlp=layer.mlp, attention=layer.self_attn, head_dim=head_dim)
        for index, layer in enumerate(model.model.layers)
    ]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once; LoRA adapters do not count, as they end up in the weights beside them."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)
