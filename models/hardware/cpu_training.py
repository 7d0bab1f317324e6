"""Training on a CPU: plain attention where it is faster than torch's fused kernel, and freed memory that is kept for the next step.

The backward pass of the fused kernel costs several times that of the plain products at the lengths of short answers (batch 16, 109
tokens, 9 heads on 2 cores: 34 ms a layer against 8); its saving of memory matters at long ones, where it stays in use.

glibc maps every large tensor and unmaps it when it is freed, so that each step touches hundreds of megabytes of fresh pages,
which the kernel has to clear first.  On two cores that was a third of an on-policy step.

Legend: B samples, H query heads, G key/value heads, T tokens, K head width.
"""

import ctypes
import gc
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "potstill"
LONGEST = 256  # tokens; beyond, the fused kernel's backward pass catches up
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KEEP = 2**31 - 1
_DEFAULT_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536  # mallopt(3)


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


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_for_training(model: PreTrainedModel) -> None:
    """Let a model that would use torch's fused kernel use `attend`; one with a soft cap (Gemma 2) never does, and stays as it is."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def keep_freed_memory() -> None:
    """Ask glibc, for this process, to serve large tensors from a heap that it does not shrink; elsewhere, do nothing."""
    _set(mmap_max=0, threshold=_KEEP)


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory`, and give the system what is free already."""
    _set(mmap_max=_DEFAULT_MMAP_MAX, threshold=_DEFAULT_THRESHOLD)
    release_memory()


def release_memory() -> None:
    """Free what nothing refers to any more, and give the system what is free: glibc keeps gigabytes of tensors below its threshold."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _set(*, mmap_max: int, threshold: int) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, mmap_max)
        libc.mallopt(_M_TRIM_THRESHOLD, threshold)
