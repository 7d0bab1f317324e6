"""Model families for surgery and quantization: where the decoder layers are and how they are wired.

Everything else in Potstill talks to a model through plain Hugging Face calls.  A `DecoderLayer` is a *view*: it owns nothing, and
it is rebuilt whenever it is needed, so that it can never disagree with the modules it describes.  A `Family` gives names only;
all sizes come from the shapes of the weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# The key/value cache, as an argument of a model and of an attention, and in a model's output: `past_key_values` before transformers 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


@dataclass(frozen=True)
class Family:
    """Names inside the decoder layers of a family; the defaults are Llama's.

    A family that can be described has pre-norms, a gated MLP, grouped-query attention over heads of one width, and RMSNorms.

    Attributes:
        attention: The attention of a layer.
        mlp: The gated MLP of a layer.
        qkv: In the attention: query, key and value projections, or the one layer that stacks their outputs in this order.
        o_proj: In the attention: the projection from the heads to the hidden size.
        gate_up: In the MLP: gate and up projections, or the one layer that stacks their outputs in this order.
        down_proj: In the MLP: the projection from the neurons to the hidden size.
        stream_norms: The norms of a layer that read the residual stream.
        output_norms: The norms of a layer between `o_proj` or `down_proj` and the residual stream.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    o_proj: str = "o_proj"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down_proj: str = "down_proj"
    stream_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    output_norms: tuple[str, ...] = ()


_LLAMA = Family()
_PHI = Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",))
_GEMMA = Family(
    stream_norms=("input_layernorm", "pre_feedforward_layernorm"),
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _PHI,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}


@dataclass(frozen=True)
class Part:
    """Consecutive outputs of a linear layer: all of them, or the part of a layer that stacks several projections."""

    linear: Any
    start: int
    size: int

    @property
    def weight(self) -> Tensor:
        """The rows of the layer's weight, a view of shape (size, inputs)."""
        return self.linear.weight[self.start : self.start + self.size]


@dataclass(frozen=True)
class DecoderLayer:
    """One transformer block, `index` from 0: a gated MLP and grouped-query attention."""

    index: int
    block: Any
    family: Family

    @property
    def attention(self) -> Any:
        """The module with `o_proj` and the query, key and value projections."""
        return getattr(self.block, self.family.attention)

    @property
    def mlp(self) -> Any:
        """The module with `down_proj` and the gate and up projections."""
        return getattr(self.block, self.family.mlp)

    @property
    def o_proj(self) -> Any:
        """Linear layer: heads * head_dim -> hidden."""
        return getattr(self.attention, self.family.o_proj)

    @property
    def down_proj(self) -> Any:
        """Linear layer: neurons -> hidden."""
        return getattr(self.mlp, self.family.down_proj)

    @property
    def queries(self) -> Part:
        """Outputs of the query projection: heads * head_dim."""
        return self._qkv()[0]

    @property
    def keys(self) -> Part:
        """Outputs of the key projection: groups * head_dim."""
        return self._qkv()[1]

    @property
    def values(self) -> Part:
        """Outputs of the value projection: groups * head_dim."""
        return self._qkv()[2]

    @property
    def gate(self) -> Part:
        """Outputs of the gate projection: neurons."""
        return self._gate_up()[0]

    @property
    def up(self) -> Part:
        """Outputs of the up projection: neurons."""
        return self._gate_up()[1]

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.attention.head_dim

    @property
    def num_neurons(self) -> int:
        """Neurons of the gated MLP."""
        return self.down_proj.weight.shape[1]

    @property
    def num_query_heads(self) -> int:
        """Query heads."""
        return self.o_proj.weight.shape[1] // self.head_dim

    @property
    def num_kv_groups(self) -> int:
        """Key/value heads; each serves a group of query heads."""
        rows = sum(getattr(self.attention, name).weight.shape[0] for name in self.family.qkv)
        return (rows // self.head_dim - self.num_query_heads) // 2

    @property
    def stream_norms(self) -> list[Any]:
        """The norms over the hidden size that read the residual stream."""
        return [getattr(self.block, name) for name in self.family.stream_norms]

    @property
    def output_norms(self) -> list[Any]:
        """The norms over the hidden size of what attention and MLP give, before it joins the residual stream."""
        return [getattr(self.block, name) for name in self.family.output_norms]

    def linears(self) -> Iterator[tuple[nn.Module, str]]:
        """The layer's projections as (owner, attribute name), in the order in which data meets them."""
        for name in (*self.family.qkv, self.family.o_proj):
            yield self.attention, name
        for name in (*self.family.gate_up, self.family.down_proj):
            yield self.mlp, name

    def _qkv(self) -> list[Part]:
        heads, groups = self.num_query_heads * self.head_dim, self.num_kv_groups * self.head_dim
        return _parts(self.attention, self.family.qkv, (heads, groups, groups))

    def _gate_up(self) -> list[Part]:
        return _parts(self.mlp, self.family.gate_up, (self.num_neurons, self.num_neurons))


def _parts(owner: nn.Module, names: Sequence[str], sizes: Sequence[int]) -> list[Part]:
    """Parts of these sizes: one linear layer for each, or one for all."""
    linears = [getattr(owner, name) for name in names]
    if len(linears) == 1:
        starts = accumulate(sizes[:-1], initial=0)
        return [Part(linears[0], start, size) for start, size in zip(starts, sizes, strict=True)]
    return [Part(linear, 0, size) for linear, size in zip(linears, sizes, strict=True)]


def check_family(config: PretrainedConfig) -> Family:
    """The description of a model's family.

    Raises:
        ValueError: Pruning, quantization and export do not know this family.
    """
    known = ", ".join(FAMILIES)
    if config.get_text_config() is not config:
        raise ValueError(
            f"expected a model of text alone, of one of the families {known}, found the multimodal model_type "
            f"{config.model_type!r}; save its language model as a folder of its own and name that one"
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"expected a model of one of the families {known}, found model_type {config.model_type!r}; choose such a model, or "
            "describe the new family in models/architecture.py (names of attention, gated MLP, their projections, and the norms "
            "on the residual stream and on what is added to it)"
        )
    return FAMILIES[config.model_type]


def decoder_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """The decoder layers of a Hugging Face causal language model.

    Raises:
        ValueError: The model's family is not one of `FAMILIES`.
    """
    family = check_family(model.config)
    return [DecoderLayer(index, block, family) for index, block in enumerate(model.model.layers)]


@torch.no_grad()
def gain_offset(norm: Any) -> Tensor:
    """What an RMSNorm adds to its weight before it multiplies with it: 0, or 1 (Gemma)."""
    weight = norm.weight.float()
    gain = norm(torch.full_like(weight, 1e4))  # of equal channels each is 1 after the division, up to epsilon
    return (gain - weight).mean().round()


def head_name(model: PreTrainedModel) -> str:
    """The qualified name of the output head, such as `lm_head`."""
    head: Any = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once; LoRA adapters and learned scales do not count, as they end up in weights and buffers."""
    beside = (".lora_", ".log_scale")
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in beside))
