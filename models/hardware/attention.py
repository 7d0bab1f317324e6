"""Attention of models in training and of their teachers, by device, under one name that transformers knows.

- On a CPU, plain products where they are faster than torch's fused kernel.  Its backward pass costs several times that of the plain
  products at the lengths of short answers (batch 16, 109 tokens, 9 heads on 2 cores: 34 ms a layer against 8); its saving of memory
  matters at long ones, where it stays in use.
- On a GPU, no mask where causal order is enough: padding on the right comes after all that is real, so nothing real looks at it.
  With a mask torch cannot choose flash attention, and looking whether a mask hides anything makes the host wait for the GPU.

Legend: B samples, H query heads, G key/value heads, T tokens, K head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "potstill"
LONGEST = 256  # tokens; beyond, the fused kernel's backward pass catches up on a CPU
_right_padded = ContextVar("right_padded", default=False)


@contextmanager
def right_padded() -> Iterator[None]:
    """Inside, batches of models of `use_attention` have their padding on the right, and nobody reads what is computed there."""
    token = _right_padded.set(True)
    try:
        yield
    finally:
        _right_padded.reset(token)


def use_attention(model: PreTrainedModel) -> None:
    """Let a model that would use torch's fused kernel use `attend`; one with a soft cap (Gemma 2) never does, and stays as it is."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query_BHTK: Tensor,
    key_BGTK: Tensor,
    value_BGTK: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form transformers asks for; the mask (B, 1, T, T) is True where a position may look.

    A sliding window is part of the mask.

    Raises:
        ValueError: The scores are to have a soft cap, which neither way computes.
    """
    if kwargs.get("softcap") is not None:
        raise ValueError(
            f"expected attention without a soft cap, found one of {kwargs['softcap']}; load the model with "
            "attn_implementation='eager', which computes it"
        )
    learns = torch.is_grad_enabled() and query_BHTK.requires_grad
    if not learns or query_BHTK.device.type != "cpu" or key_BGTK.shape[2] > LONGEST or dropout:
        return sdpa_attention_forward(
            module, query_BHTK, key_BGTK, value_BGTK, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query_BHTK.shape[1] // key_BGTK.shape[1]
    key_BHTK, value_BHTK = repeat_kv(key_BGTK, groups), repeat_kv(value_BGTK, groups)
    if attention_mask is None:  # nothing but the causal order
        tokens = query_BHTK.shape[2]
        attention_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query_BHTK.device).tril()
    scale = query_BHTK.shape[-1] ** -0.5 if scaling is None else scaling
    scores_BHTT = (query_BHTK * scale) @ key_BHTK.transpose(2, 3)
    scores_BHTT = scores_BHTT.masked_fill(~attention_mask, torch.finfo(scores_BHTT.dtype).min)
    shares_BHTT = torch.softmax(scores_BHTT, dim=-1, dtype=torch.float32).to(value_BHTK.dtype)
    return (shares_BHTT @ value_BHTK).transpose(1, 2).contiguous(), None


def _mask(*, attention_mask: Tensor | None = None, device: Any = "cpu", **kwargs: Any) -> Tensor | None:
    """The mask that transformers makes; of a batch that is padded on the right on a GPU, without its padding."""
    if _right_padded.get() and torch.device(device).type != "cpu":
        attention_mask = None
    return sdpa_mask(attention_mask=attention_mask, device=device, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)
