"""Samples a token from logits: temperature, top-k, top-p, minimum length, and randomness that belongs to the sample.

Every answer has random numbers of its own, drawn from a seed that names the sample.  What a student says to a prompt is then a
function of (weights, prompt, seed): not of the batch it was sampled in, of the micro-batching, of the rank, or of a saved state.

Legend: B rows, G generated tokens, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from program.ranges import Between, Count, check_fields


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Args:
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Sample among the so many most probable tokens; 0 for all.
        top_p: Sample among the most probable tokens that together reach this probability.
        min_tokens: Tokens before an answer may end.
    """

    temperature: Annotated[float, Between(0, 1000)] = 1.0
    top_k: Count = 0
    top_p: Annotated[float, Between(1e-6, 1)] = 1.0
    min_tokens: Count = 0

    def __post_init__(self) -> None:
        check_fields(self, "sampling.")


GREEDY = Sampling(temperature=0.0)


def seed_of(*key: Any) -> int:
    """A seed that depends on its key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


def uniforms(seeds: Sequence[int], num_tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Random numbers (B, G) in [0, 1), row b from `seeds[b]` alone."""
    rows = [torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device, non_blocking=True)


def sample(
    logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling, *, end_tokens: Tensor, num_sampled: int = 0
) -> Tensor:
    """One token for every row, shape (B,).

    Random numbers in [0, 1) are not used at temperature 0.  `end_tokens` end an answer, and are not sampled before it
    has `sampling.min_tokens`; every answer has `num_sampled` tokens already.
    """
    if num_sampled < sampling.min_tokens and end_tokens.numel():
        logits_BV = logits_BV.index_fill(1, end_tokens, -torch.inf)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scores_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k:
        scores_BV = TopKLogitsWarper(sampling.top_k)(None, scores_BV)
    if sampling.top_p < 1:
        scores_BV = TopPLogitsWarper(sampling.top_p)(None, scores_BV)
    # The inverse of the cumulative distribution: one random number for a row instead of one for every token of the vocabulary.
    cumulative_BV = torch.softmax(scores_BV, dim=-1).cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:]
    # Below the total even after rounding, so that a token of probability 0 at the end is never taken.
    thresholds_B1 = torch.minimum(uniform_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, thresholds_B1, right=True).squeeze(1)
