"""The two forms of a teacher's answer to one token, and their numbers on disk.

| form    | what is kept                                                      | bytes a token                            |
|---------|-------------------------------------------------------------------|------------------------------------------|
| `exact` | the final hidden state in bfloat16; the head is stored once       | 2 E                                      |
| `top_k` | K log-probabilities in float16, their tokens, the tail's log mass | 4 K + 4, or 5 K + 4 from 65,537 tokens on |

The exact form loses nothing but the rounding to bfloat16, and a teacher that computes in bfloat16 loses nothing at all.  The
compact form knows only what the K most probable tokens are given and what is left for all others together, so it serves the
losses that need no more.

Log-probabilities are kept in float16, not bfloat16: their range (-30 to 0) needs no large exponent, and the three more bits of
significand make the stored distribution's KL to the true one 64 times smaller (SmolLM2-135M, K = 64: 1.0e-7 instead of 6.7e-6 nats).  The tail's mass is kept apart in float32,
because one minus the sum of K rounded probabilities would be noise where the tail is small (or below zero); on reading, the K
probabilities are scaled so that the sum is one again, which also removes the rounding error that they have in common.

Legend: N answer tokens, E the teacher's hidden size, K kept tokens, V vocabulary.
"""

import torch
from torch import Tensor

from models.losses.output_head import Head

Columns = dict[str, Tensor]  # each (N, width)
Layout = dict[str, tuple[torch.dtype, int]]  # type and width of every column
FORMS = ("exact", "top_k")
LOGITS_AT_ONCE = 2**26  # numbers of one chunk of logits: 256 MiB in float32


def exact_layout(hidden_size: int) -> Layout:
    """Columns of the exact form."""
    return {"hidden": (torch.bfloat16, hidden_size)}


def top_k_layout(top_k: int, vocabulary: int) -> Layout:
    """Columns of the compact form; token ids take two bytes, and a third one where two are too few."""
    layout: Layout = {"log_probabilities": (torch.float16, top_k), "tokens": (torch.uint16, top_k)}
    if vocabulary > 2**16:
        layout["tokens_high"] = (torch.uint8, top_k)
    return {**layout, "log_tail": (torch.float32, 1)}


def bytes_per_token(layout: Layout) -> int:
    """Size of one token's answer on disk."""
    return sum(dtype.itemsize * width for dtype, width in layout.values())


def encode_exact(hidden_NE: Tensor) -> Columns:
    """The hidden states as they are stored."""
    return {"hidden": hidden_NE.to(torch.bfloat16)}


def encode_top_k(hidden_NE: Tensor, head: Head, top_k: int, vocabulary: int) -> Columns:
    """The K most probable tokens among the first `vocabulary` of the head, most probable first, as they are stored."""
    chunks = hidden_NE.split(max(1, LOGITS_AT_ONCE // vocabulary))
    parts = [_top_k_of(head.logits(chunk_NE, vocabulary).float(), top_k) for chunk_NE in chunks]
    log_p_NK, tokens_NK, log_tail_N1 = (torch.cat(part) for part in zip(*parts, strict=True))
    columns = {"log_probabilities": log_p_NK.half(), "log_tail": log_tail_N1}
    columns["tokens"] = (tokens_NK % 2**16).to(torch.uint16)
    if vocabulary > 2**16:
        columns["tokens_high"] = (tokens_NK // 2**16).to(torch.uint8)
    return columns


def decode_top_k(columns: Columns) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, K) in float32, which leave exactly the stored tail, and their tokens (N, K)."""
    log_p_NK = columns["log_probabilities"].float()
    log_head_N1 = torch.log1p(-columns["log_tail"].exp())
    tokens_NK = columns["tokens"].long()
    if "tokens_high" in columns:
        tokens_NK = tokens_NK + 2**16 * columns["tokens_high"].long()
    return log_p_NK + log_head_N1 - log_p_NK.logsumexp(-1, keepdim=True), tokens_NK


def _top_k_of(logits_NV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    log_p_NV = torch.log_softmax(logits_NV, dim=-1)
    log_p_NK, tokens_NK = log_p_NV.topk(top_k, dim=-1)
    log_tail_N1 = log_p_NV.scatter(-1, tokens_NK, float("-inf")).logsumexp(-1, keepdim=True)
    return log_p_NK, tokens_NK, log_tail_N1
