"""Incremental decoding: inference weights of a student in training, a key/value cache, and one token for every row at a time.

Two decoders with the same methods:

- `TransformersDecoder` runs the Hugging Face model with its own cache.  It serves every family and is the definition.
- `FusedDecoder` computes the same for Llama-type models from its own copy of the weights: query, key and value as one matrix
  product, gate and up as another, a cache allocated once.  A small model's token costs little more than reading its weights,
  and the many small calls around them would cost several times that.

Both copy the model's weights, in the floating point type of the rollout, when they are made: a decoder lives for one rollout of a
student in training.

Legend: B rows, P prompt tokens, N new tokens, T cached positions, D hidden, H query heads, G key/value heads, X = H + 2 G all heads,
Y = 2 G cached heads, K head width, M neurons, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from models.architecture import decoder_layers
from models.forward import inference_copy
from models.quantization.fp8 import fake_quantize_fp8
from models.quantization.linear import FakeQuantizedLinear
from models.sharding import is_sharded

# Rotary frequencies of these kinds depend on the length of the sequence, so they cannot be computed once.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

_KNOWN_LINEARS = (nn.Linear, FakeQuantizedLinear)


class Decoder(Protocol):
    """What `rollout` needs of a model."""

    def prefill(self, prompts_BP: Tensor, mask_BP: Tensor, max_new_tokens: int) -> Tensor:
        """Read left-padded prompts and make room for `max_new_tokens` more; next-token logits (B, V)."""

    def step(self, token_B: Tensor) -> Tensor:
        """Append one token to every row; next-token logits (B, V)."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""


def decoder_for(model: PreTrainedModel, dtype: torch.dtype) -> Decoder:
    """The fastest decoder for a model; it computes in `dtype`, in evaluation mode, and leaves the model alone."""
    return FusedDecoder(model, dtype) if FusedDecoder.supports(model) else TransformersDecoder(model, dtype)


class TransformersDecoder:
    """Any causal language model, through its own forward and cache.

    Args:
        model: The model to copy.
        dtype: Floating point type of the copy.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model = inference_copy(model, dtype)

    @torch.no_grad()
    def prefill(self, prompts_BP: Tensor, mask_BP: Tensor, max_new_tokens: int) -> Tensor:
        """See `Decoder`."""
        self._cache = DynamicCache(config=self.model.config)
        self._mask_BT, self._lengths_B = mask_BP, mask_BP.sum(1)
        return self._forward(prompts_BP, (mask_BP.cumsum(1) - 1).clamp(min=0))

    @torch.no_grad()
    def step(self, token_B: Tensor) -> Tensor:
        """See `Decoder`."""
        self._mask_BT = F.pad(self._mask_BT, (0, 1), value=1)
        self._lengths_B = self._lengths_B + 1
        return self._forward(token_B[:, None], self._lengths_B[:, None] - 1)

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self._cache.batch_select_indices(rows)
        self._mask_BT, self._lengths_B = self._mask_BT[rows], self._lengths_B[rows]

    def _forward(self, tokens_BN: Tensor, positions_BN: Tensor) -> Tensor:
        output = self.model.base_model(
            input_ids=tokens_BN,
            attention_mask=self._mask_BT,
            position_ids=positions_BN,
            past_key_values=self._cache,
            use_cache=True,
        )
        # Two dimensions on purpose: on a strided (B, 1, D) input, torch would copy the frozen head once per row.
        return self.model.get_output_embeddings()(output.last_hidden_state[:, -1])


class FusedDecoder:
    """Llama-type models (see `models/architecture.py`), pruned and fake-quantized ones included.

    Args:
        model: The model to copy the weights of.
        dtype: Floating point type of weights, cache and computation.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._body: Any = model.base_model
        self._layers = [_Layer(model, index, dtype) for index in range(len(decoder_layers(model)))]
        self._head = _Weights([model.get_output_embeddings()], dtype)
        self._embedding: Any = model.get_input_embeddings()
        self._norm = _Norm(self._body.norm, dtype)

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether this class computes what the model computes."""
        config = model.config
        rope: Any = getattr(model.base_model, "rotary_emb", None)
        return (
            not is_sharded(model)
            and config.model_type in ("llama", "mistral", "qwen2", "qwen3")
            and rope is not None
            and rope.rope_type not in _LENGTH_DEPENDENT_ROPE
            and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
            and getattr(config, "sliding_window", None) is None
            and all(
                type(getattr(owner, name)) in _KNOWN_LINEARS and type(getattr(owner, name).weight) is nn.Parameter
                for layer in decoder_layers(model)
                for owner, name in layer.linears()
            )
        )

    @torch.no_grad()
    def prefill(self, prompts_BP: Tensor, mask_BP: Tensor, max_new_tokens: int) -> Tensor:
        """See `Decoder`."""
        num_prompt = prompts_BP.shape[1]
        total = num_prompt + max_new_tokens
        self._lengths_B, self._position = mask_BP.sum(1), num_prompt
        self._mask_BT = F.pad(mask_BP.bool(), (0, max_new_tokens), value=True)
        cos_1TK, sin_1TK = self._body.rotary_emb(
            torch.empty(0, dtype=torch.float32, device=prompts_BP.device),
            torch.arange(total, device=prompts_BP.device)[None],
        )
        # The sign of the rotated half goes into the sine, so that turning a head is a roll by half its width and two products.
        half = cos_1TK.shape[-1] // 2
        signed_TK = torch.cat([-sin_1TK[0, :, :half], sin_1TK[0, :, half:]], dim=-1)
        self._cos_TK, self._sin_TK = cos_1TK[0].to(self._dtype), signed_TK.to(self._dtype)
        for layer in self._layers:
            layer.allocate(len(prompts_BP), total)
        positions_BP = (mask_BP.cumsum(1) - 1).clamp(min=0)
        causal_PP = torch.ones(num_prompt, num_prompt, dtype=torch.bool, device=prompts_BP.device).tril()
        # A padding position sees itself, so that its softmax has a term; nobody sees padding.
        seen_BPP = causal_PP & mask_BP.bool()[:, None] | torch.eye(
            num_prompt, dtype=torch.bool, device=causal_PP.device
        )
        return self._forward(prompts_BP, positions_BP, 0, seen_BPP[:, None])

    @torch.no_grad()
    def step(self, token_B: Tensor) -> Tensor:
        """See `Decoder`."""
        start, self._position = self._position, self._position + 1
        positions_B1 = self._lengths_B[:, None]
        self._lengths_B = self._lengths_B + 1
        return self._forward(token_B[:, None], positions_B1, start, self._mask_BT[:, None, None, : self._position])

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        for layer in self._layers:
            layer.keep(rows)
        self._mask_BT, self._lengths_B = self._mask_BT[rows], self._lengths_B[rows]

    def _forward(self, tokens_BN: Tensor, positions_BN: Tensor, start: int, seen_B1NT: Tensor) -> Tensor:
        cos_B1NK, sin_B1NK = self._cos_TK[positions_BN][:, None], self._sin_TK[positions_BN][:, None]
        turns: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # layers may be pruned to different numbers of heads
        x_BND = F.embedding(tokens_BN, self._embedding.weight).to(self._dtype)
        for layer in self._layers:
            if layer.shape not in turns:
                turns[layer.shape] = _turn(cos_B1NK, 1, *layer.shape), _turn(sin_B1NK, 0, *layer.shape)
            x_BND = layer(x_BND, *turns[layer.shape], start, seen_B1NT)
        return self._head(self._norm(x_BND[:, -1]))


def _turn(table_B1NK: Tensor, of_values: float, heads: int, groups: int) -> Tensor:
    """A cosine or sine for every head of a layer: values do not turn, but taking them out would cost more than turning by 0."""
    turning = table_B1NK.expand(-1, heads + groups, -1, -1)
    return torch.cat([turning, torch.full_like(turning[:, :groups], of_values)], dim=1)


class _Layer:
    """One transformer block with its part of the cache."""

    def __init__(self, model: PreTrainedModel, index: int, dtype: torch.dtype) -> None:
        view = decoder_layers(model)[index]
        body: Any = model.base_model
        block = body.layers[index]
        attention, mlp = view.attention, view.mlp
        self.dtype, self.device = dtype, model.device
        self.heads, self.groups, self.head_dim = view.num_query_heads, view.num_kv_groups, view.head_dim
        self.shape = (self.heads, self.groups)
        self.scaling, self.activation = attention.scaling, mlp.act_fn
        self.input_norm, self.mlp_norm = (
            _Norm(block.input_layernorm, dtype),
            _Norm(block.post_attention_layernorm, dtype),
        )
        self.head_norms = [_Norm(getattr(attention, n), dtype) for n in ("q_norm", "k_norm") if hasattr(attention, n)]
        self.qkv = _Weights([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.output = _Weights([attention.o_proj], dtype)
        self.gate_up = _Weights([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = _Weights([mlp.down_proj], dtype)

    def allocate(self, rows: int, positions: int) -> None:
        shape = (rows, 2 * self.groups, positions, self.head_dim)  # keys, then values
        self.cache_BYTK = torch.empty(shape, dtype=self.dtype, device=self.device)

    def keep(self, rows: Tensor) -> None:
        self.cache_BYTK = self.cache_BYTK[rows]

    def __call__(self, x_BND: Tensor, cos_BXNK: Tensor, sin_BXNK: Tensor, start: int, seen_B1NT: Tensor) -> Tensor:
        x_BND = x_BND + self._attend(self.input_norm(x_BND), cos_BXNK, sin_BXNK, start, seen_B1NT)
        gate_BNM, up_BNM = self.gate_up(self.mlp_norm(x_BND)).chunk(2, dim=-1)
        return x_BND + self.down(self.activation(gate_BNM).mul_(up_BNM))

    def _attend(self, x_BND: Tensor, cos_BXNK: Tensor, sin_BXNK: Tensor, start: int, seen_B1NT: Tensor) -> Tensor:
        rows, new, _ = x_BND.shape
        heads_BXNK = self.qkv(x_BND).view(rows, new, -1, self.head_dim).transpose(1, 2)
        if self.head_norms:
            *turning, values_BGNK = heads_BXNK.split([self.heads, self.groups, self.groups], dim=1)
            normed = [norm(x) for norm, x in zip(self.head_norms, turning, strict=True)]
            heads_BXNK = torch.cat([*normed, values_BGNK], dim=1)
        turned_BXNK = torch.addcmul(heads_BXNK * cos_BXNK, heads_BXNK.roll(self.head_dim // 2, -1), sin_BXNK)
        queries_BHNK, new_BYNK = turned_BXNK.split([self.heads, 2 * self.groups], dim=1)
        end = start + new
        self.cache_BYTK[:, :, start:end] = new_BYNK
        keys_BGTK, values_BGTK = self.cache_BYTK[:, :, :end].chunk(2, dim=1)
        if new == 1:
            # The query heads of one group stand in the place of positions: keys and values are read once, not repeated.
            queries_BHNK = queries_BHNK.reshape(rows, self.groups, -1, self.head_dim)
        attended = F.scaled_dot_product_attention(
            queries_BHNK,
            keys_BGTK,
            values_BGTK,
            attn_mask=seen_B1NT,
            scale=self.scaling,
            enable_gqa=new > 1,
        )
        if new == 1:
            return self.output(attended.reshape(rows, 1, -1))
        return self.output(attended.transpose(1, 2).reshape(rows, new, -1))


class _Weights:
    """One matrix for all linear layers that read the same tensor; quantized ones are called one after the other."""

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype) -> None:
        self.quantized = any(isinstance(linear, FakeQuantizedLinear) for linear in linears)
        self.linears, self.sizes = linears, [len(linear.weight) for linear in linears]
        weights = [_quantize(linear.weight.detach(), linear, "weight_quantizer").to(dtype) for linear in linears]
        self.weight = torch.cat(weights)
        has_bias = getattr(linears[0], "bias", None) is not None
        self.bias = torch.cat([linear.bias.detach().to(dtype) for linear in linears]) if has_bias else None
        self.packed = not self.quantized and _can_pack(self.weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if not self.quantized:
            return F.linear(x, self.weight, self.bias)
        biases = [None] * len(self.sizes) if self.bias is None else self.bias.split(self.sizes)
        parts = zip(self.linears, self.weight.split(self.sizes), biases, strict=True)
        return torch.cat([F.linear(_quantize(x, linear, "input_quantizer"), w, b) for linear, w, b in parts], dim=-1)


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can lay a matrix out once for many products, as torch's own compiler does for inference."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _quantize(x: Tensor, linear: Any, name: str) -> Tensor:
    """What a layer's quantizer does in evaluation mode: a rollout must not set the scales of a student in training."""
    quantizer = getattr(linear, name, None)
    return fake_quantize_fp8(x, quantizer.scale) if quantizer is not None and quantizer.frozen else x


class _Norm:
    """RMSNorm; a product in float32 would be cast back at once, so the weight has the type of the computation."""

    def __init__(self, norm: Any, dtype: torch.dtype) -> None:
        self.weight, self.epsilon = norm.weight.detach().to(dtype, copy=True), norm.variance_epsilon
        self.doubled = torch.cat([self.weight, self.weight])

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        # On a CPU rms_norm is ten small calls, layer_norm is one: of x and -x, the mean is 0 and the variance the mean square.
        doubled = torch.cat([x, -x], dim=-1)
        return F.layer_norm(doubled, self.doubled.shape, self.doubled, None, self.epsilon)[..., : x.shape[-1]]
