"""Incremental decoding: inference weights of a student in training, a key/value cache, and one token for every row at a time.

Two decoders with the same methods:

- `TransformersDecoder` runs the Hugging Face model with its own cache.  It serves every family and is the definition.
- `FusedDecoder` (`models/generation/fused_decoder.py`) computes the same for Llama-type models from its own copy of the weights, in few calls.

Both copy the model's weights, in the floating point type of the rollout, when they are made: a decoder lives for one rollout of a
student in training.

Legend: B rows, P prompt tokens, N new tokens, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from models.architecture import CACHE
from models.copies import inference_copy
from models.generation.fused_decoder import FusedDecoder
from models.losses.output_head import logits_of


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
    """A copy of any causal language model in this floating point type, through its own forward and cache."""

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
            use_cache=True,
            **{CACHE: self._cache},
        )
        # Two dimensions on purpose: on a strided (B, 1, D) input, torch would copy the frozen head once per row.
        return logits_of(self.model, output.last_hidden_state[:, -1])
