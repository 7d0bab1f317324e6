"""Incremental decoding of Llama-type models where a small model's token costs little more than reading its weights.

The many small calls around the matrix products would cost as much as the products, so there are few: query, key and value are one
product, gate and up another, rows are kept flat, the residual is added inside the product where that is possible, and the cache
is allocated once and read through views that last for `WINDOW` tokens.

Legend: B rows, P prompt tokens, N new tokens, R = B N flat rows, T positions of the cache, D hidden, H query heads, G key/value
heads, X = H + 2 G all heads, Y = 2 G cached heads, K head width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from models.architecture import decoder_layers
from models.generation.fused_weights import Norm, Weights
from models.hardware.sharding import is_sharded
from models.quantization.cache import cache_format
from models.quantization.linear import FakeQuantizedLinear

WINDOW = 64  # positions by which the cache that attention reads grows; those not yet written are masked

# Rotary frequencies of these kinds depend on the length of the sequence, so they cannot be computed once.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # one wiring, without soft caps, output norms or stacked projections

_KNOWN_LINEARS = (nn.Linear, FakeQuantizedLinear)


class FusedDecoder:
    """A `models.generation.decoder.Decoder` of Llama-type models (`FAMILIES`), pruned and fake-quantized ones included.

    `dtype` is the floating point type of weights, cache and computation.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._body: Any = model.base_model
        self._layers = [_Layer(model, index, dtype) for index in range(len(decoder_layers(model)))]
        self._head = Weights([model.get_output_embeddings()], dtype)
        self._embedding: Any = model.get_input_embeddings()
        self._norm = Norm(self._body.norm, dtype)

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether this class computes what the model computes."""
        config = model.config
        rope: Any = getattr(model.base_model, "rotary_emb", None)
        return (
            not is_sharded(model)
            and cache_format(model) is None
            and config.model_type in FAMILIES
            and rope is not None
            and rope.rope_type not in _LENGTH_DEPENDENT_ROPE
            and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
            and getattr(config, "sliding_window", None) is None
            and all(
                type(linear := getattr(owner, name)) in _KNOWN_LINEARS
                and not is_traceable_wrapper_subclass(linear.weight)
                for layer in decoder_layers(model)
                for owner, name in layer.linears()
            )
        )

    @torch.inference_mode()
    def prefill(self, prompts_BP: Tensor, mask_BP: Tensor, max_new_tokens: int) -> Tensor:
        """See `Decoder`."""
        rows, num_prompt = prompts_BP.shape
        device = prompts_BP.device
        total = num_prompt + max_new_tokens + -(num_prompt + max_new_tokens) % WINDOW
        self._lengths_B, self._position = mask_BP.sum(1), num_prompt
        cos_1TK, sin_1TK = self._body.rotary_emb(
            torch.empty(0, dtype=torch.float32, device=device), torch.arange(total, device=device)[None]
        )
        # The sign of the rotated half goes into the sine, so that turning a head is a roll by half its width and two products.
        half = cos_1TK.shape[-1] // 2
        signed_TK = torch.cat([-sin_1TK[0, :, :half], sin_1TK[0, :, half:]], dim=-1)
        self._cos_TK, self._sin_TK = cos_1TK[0].to(self._dtype), signed_TK.to(self._dtype)
        for layer in self._layers:
            layer.allocate(rows, total)
        self._bias_B11T = torch.full((rows, 1, 1, total), -torch.inf, dtype=self._dtype, device=device)
        self._bias_B11T[:, 0, 0, :num_prompt].masked_fill_(mask_BP.bool(), 0)
        self._look(num_prompt)
        causal_PP = torch.ones(num_prompt, num_prompt, dtype=torch.bool, device=device).tril()
        # A padding position sees itself, so that its softmax has a term; nobody sees padding.
        itself_PP = torch.eye(num_prompt, dtype=torch.bool, device=device)
        seen_B1PP = (causal_PP & mask_BP.bool()[:, None] | itself_PP)[:, None]
        positions_BP = (mask_BP.cumsum(1) - 1).clamp(min=0)
        return self._forward(prompts_BP, positions_BP, 0, seen_B1PP)

    @torch.inference_mode()
    def step(self, token_B: Tensor) -> Tensor:
        """See `Decoder`."""
        position = self._position
        self._bias_B11T[..., position] = 0
        if position >= self._end:
            self._look(position + 1)
        logits_BV = self._forward(
            token_B[:, None], self._lengths_B[:, None], position, self._bias_B11T[..., : self._end]
        )
        self._position, self._lengths_B = position + 1, self._lengths_B + 1
        return logits_BV

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        for layer in self._layers:
            layer.cache_BYTK = layer.cache_BYTK[rows]
        self._bias_B11T, self._lengths_B = self._bias_B11T[rows], self._lengths_B[rows]
        self._look(self._position)

    def _look(self, positions: int) -> None:
        """Let steps read at least so many positions of the cache."""
        self._end = positions + -positions % WINDOW
        for layer in self._layers:
            layer.seen_BYTK = layer.cache_BYTK[:, :, : self._end].chunk(2, dim=1)

    def _forward(self, tokens_BN: Tensor, positions_BN: Tensor, start: int, mask_B1NT: Tensor) -> Tensor:
        shape = tokens_BN.shape
        cos_R1K, sin_R1K = (table_TK[positions_BN.flatten()][:, None] for table_TK in (self._cos_TK, self._sin_TK))
        turns: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # layers may be pruned to different numbers of heads
        x_RD = F.embedding(tokens_BN.flatten(), self._embedding.weight).to(self._dtype)
        for layer in self._layers:
            if layer.heads_and_groups not in turns:
                heads, groups = layer.heads_and_groups
                turns[heads, groups] = _turn(cos_R1K, 1, heads, groups), _turn(sin_R1K, 0, heads, groups)
            x_RD = layer(x_RD, shape, turns[layer.heads_and_groups], start, mask_B1NT)
        return self._head(self._norm(x_RD if shape[1] == 1 else x_RD.view(*shape, -1)[:, -1]))


def _turn(table_R1K: Tensor, of_values: float, heads: int, groups: int) -> Tensor:
    """A cosine or sine for every head of a layer: values do not turn, but taking them out would cost more than turning by 0."""
    turning_RXK = table_R1K.expand(-1, heads + groups, -1)
    return torch.cat([turning_RXK, torch.full_like(turning_RXK[:, :groups], of_values)], dim=1)


class _Layer:
    """One transformer block with its part of the cache."""

    def __init__(self, model: PreTrainedModel, index: int, dtype: torch.dtype) -> None:
        view = decoder_layers(model)[index]
        body: Any = model.base_model
        block = body.layers[index]
        attention, mlp = view.attention, view.mlp
        self.dtype, self.device = dtype, model.device
        self.heads_and_groups, self.head_dim = (view.num_query_heads, view.num_kv_groups), view.head_dim
        self.scaling, self.activation = attention.scaling, mlp.act_fn
        self.input_norm, self.mlp_norm = Norm(block.input_layernorm, dtype), Norm(block.post_attention_layernorm, dtype)
        self.head_norms = [Norm(getattr(attention, n), dtype) for n in ("q_norm", "k_norm") if hasattr(attention, n)]
        self.qkv = Weights([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.output = Weights([attention.o_proj], dtype)
        self.gate_up = Weights([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = Weights([mlp.down_proj], dtype)
        self.cache_BYTK: Tensor
        self.seen_BYTK: tuple[Tensor, ...]  # keys and values of the positions that steps read

    def allocate(self, rows: int, positions: int) -> None:
        """Room for keys, then values; zeros, because attention multiplies what it has masked by 0."""
        shape = (rows, 2 * self.heads_and_groups[1], positions, self.head_dim)
        self.cache_BYTK = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def __call__(
        self, x_RD: Tensor, shape: torch.Size, turn: tuple[Tensor, Tensor], start: int, mask_B1NT: Tensor
    ) -> Tensor:
        x_RD = self.output(self._attend(self.input_norm(x_RD), shape, *turn, start, mask_B1NT), added_to=x_RD)
        gate_RM, up_RM = self.gate_up(self.mlp_norm(x_RD)).chunk(2, dim=-1)
        return self.down(self.activation(gate_RM).mul_(up_RM), added_to=x_RD)

    def _attend(
        self, x_RD: Tensor, shape: torch.Size, cos_RXK: Tensor, sin_RXK: Tensor, start: int, mask_B1NT: Tensor
    ) -> Tensor:
        (rows, new), (heads, groups), width = shape, self.heads_and_groups, self.head_dim
        heads_RXK = self.qkv(x_RD).view(rows * new, -1, width)
        if self.head_norms:
            *turning, values_RGK = heads_RXK.split([heads, groups, groups], dim=1)
            heads_RXK = torch.cat([*(norm(x) for norm, x in zip(self.head_norms, turning, strict=True)), values_RGK], 1)
        turned_RXK = torch.addcmul(heads_RXK * cos_RXK, heads_RXK.roll(width // 2, -1), sin_RXK)
        if new == 1:
            # The query heads of one group stand in the place of positions: keys and values are read once, not repeated.
            self.cache_BYTK.select(2, start).copy_(turned_RXK.narrow(1, heads, 2 * groups))
            queries_BGQK = turned_RXK.narrow(1, 0, heads).view(rows, groups, -1, width)
            keys_BGTK, values_BGTK = self.seen_BYTK
            attended_BGQK = F.scaled_dot_product_attention(
                queries_BGQK, keys_BGTK, values_BGTK, attn_mask=mask_B1NT, scale=self.scaling
            )
            return attended_BGQK.reshape(rows, -1)
        turned_BXNK = turned_RXK.view(rows, new, -1, width).transpose(1, 2)
        self.cache_BYTK[:, :, start : start + new] = turned_BXNK[:, heads:]
        queries_BHNK, keys_BGNK, values_BGNK = turned_BXNK.split([heads, groups, groups], dim=1)
        attended_BHNK = F.scaled_dot_product_attention(
            queries_BHNK, keys_BGNK, values_BGNK, attn_mask=mask_B1NT, scale=self.scaling, enable_gqa=True
        )
        return attended_BHNK.transpose(1, 2).reshape(rows * new, -1)
