"""Sampling answers from a model: a left-padded batch, a decoder with its cache, and random numbers that belong to each sample.

A rollout is a pure function of (weights, prompt, seed) for every sample alone, so that a resumed run, another micro-batching or
another number of ranks samples the same tokens without any saved random state.  Sampling is never differentiated.

Legend: B samples, P prompt tokens, G generated tokens, T = P + G.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.collate import IGNORE_INDEX, Batch
from models.generation.decoder import Decoder
from models.generation.sampling import GREEDY, Sampling, sample, uniforms

# Rows that have ended leave the batch when they are this share of it: taking them out copies the cache.
_ENDED_SHARE = 0.25
# Tokens between two looks at which rows have ended, on a GPU: a look makes the host wait until it has caught up.
_LOOK_EVERY = 16


@dataclass(frozen=True)
class Rollout:
    """Generated answers: tokens (B, G), and how many of each are the answer's, up to and including its end token; the rest is 0."""

    tokens_BG: Tensor
    lengths: list[int]

    @property
    def mask_BG(self) -> Tensor:
        """1 for tokens of the answer, 0 after it."""
        lengths_B1 = torch.tensor(self.lengths)[:, None]
        mask_BG = (torch.arange(self.tokens_BG.shape[1]) < lengths_B1).long()
        return mask_BG.to(self.tokens_BG.device, non_blocking=True)


@torch.no_grad()
def rollout(
    decoder: Decoder,
    prompts_BP: Tensor,
    mask_BP: Tensor,
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    vocabulary: int | None = None,
) -> Rollout:
    """Sample one answer for every prompt; answers that have ended cost nothing more.

    Args:
        decoder: The model's weights and cache, see `models.generation.decoder.decoder_for`.
        prompts_BP: Left-padded prompt tokens.
        mask_BP: 1 for prompt tokens, 0 for padding.
        max_new_tokens: Number of tokens at most.
        end_tokens: Tokens that end an answer.
        sampling: Temperature and truncation.
        seeds: One for every sample; not needed at temperature 0.
        vocabulary: Sample only the first so many tokens, for heads padded beyond what a teacher knows; None takes all.

    Raises:
        ValueError: Sampling above temperature 0 without a seed for every sample.
    """
    num_samples, device = len(prompts_BP), prompts_BP.device
    if sampling.temperature and (seeds is None or len(seeds) != num_samples):
        raise ValueError(
            f"expected a seed for each of {num_samples} samples at temperature {sampling.temperature:g}, found "
            f"{'none' if seeds is None else len(seeds)}; pass seeds, or sample at temperature 0"
        )
    known = [token for token in end_tokens if vocabulary is None or token < vocabulary]
    ends = torch.tensor(known, dtype=torch.long).to(device, non_blocking=True)
    uniforms_BG = uniforms(seeds, max_new_tokens, device) if seeds is not None else None
    tokens_BG = torch.zeros(num_samples, max_new_tokens, dtype=torch.long, device=device)
    rows_B = torch.arange(num_samples, device=device)  # of the samples that the decoder still holds
    lengths_B = torch.full((num_samples,), max_new_tokens, device=device)  # what has not ended has the longest
    alive_B = torch.ones(num_samples, dtype=torch.bool, device=device)
    held = list(range(num_samples))  # what the host knows of `rows_B`
    look_every = 1 if device.type == "cpu" else _LOOK_EVERY
    logits_BV = decoder.prefill(prompts_BP, mask_BP, max_new_tokens)
    for position in range(max_new_tokens):
        uniform_B = alive_B.float() if uniforms_BG is None else uniforms_BG[rows_B, position]
        token_B = sample(logits_BV[:, :vocabulary], uniform_B, sampling, end_tokens=ends, num_sampled=position)
        tokens_BG[rows_B, position] = torch.where(alive_B, token_B, 0)
        ends_B = alive_B & torch.isin(token_B, ends)
        lengths_B[rows_B] = torch.where(ends_B, position + 1, lengths_B[rows_B])
        alive_B = alive_B & ~ends_B
        is_last = position + 1 == max_new_tokens
        if is_last or (position + 1) % look_every == 0:
            lengths = lengths_B.tolist()
            alive = [number for number, row in enumerate(held) if lengths[row] > position + 1]
            if is_last or not alive:
                break
            if len(alive) <= (1 - _ENDED_SHARE) * len(held):
                kept = torch.tensor(alive).to(device, non_blocking=True)
                decoder.keep(kept)
                held = [held[number] for number in alive]
                rows_B, token_B, alive_B = rows_B[kept], token_B[kept], alive_B[kept]
        logits_BV = decoder.step(token_B)
    return Rollout(tokens_BG[:, : max(lengths)], lengths)


def pad_left(prompts: Sequence[Tensor]) -> Tensor:
    """Left-padded prompts (or masks) of several batches as one batch, with zeros in front."""
    width = max(prompt_BP.shape[1] for prompt_BP in prompts)
    return torch.cat([F.pad(prompt_BP, (width - prompt_BP.shape[1], 0)) for prompt_BP in prompts])


def rollout_batch(batch: Batch, answers: Rollout) -> Batch:
    """The batch with its gold answers replaced by sampled ones: right-padded inputs, labels on generated tokens only."""
    mask_BG = answers.mask_BG
    mask_BT = torch.cat([batch["prompt_mask"], mask_BG], dim=1)
    tokens_BT = torch.cat([batch["prompt_ids"], answers.tokens_BG], dim=1)
    is_answer_BT = torch.cat([torch.zeros_like(batch["prompt_mask"]), mask_BG], dim=1)
    labels_BT = torch.where(is_answer_BT.bool(), tokens_BT, IGNORE_INDEX)
    # A loader knows them; a look at the mask makes a GPU's host wait.
    starts = batch.get("prompt_lengths") or batch["prompt_mask"].sum(1).tolist()
    spans = [((start, start + length),) for start, length in zip(starts, answers.lengths, strict=True)]
    longest = max(end for ((_, end),) in spans)
    # Real tokens move to the front of their row, in order; padding goes to the back.
    order_BT = torch.argsort(mask_BT, dim=1, descending=True, stable=True)[:, :longest]
    return {
        **batch,
        "answer_spans": spans,
        "input_ids": tokens_BT.gather(1, order_BT),
        "attention_mask": mask_BT.gather(1, order_BT),
        "labels": labels_BT.gather(1, order_BT),
    }


def answer_texts(tokenizer: object, answers: Rollout) -> list[str]:
    """Generated answers as text, without special tokens."""
    rows = [row[:length] for row, length in zip(answers.tokens_BG.tolist(), answers.lengths, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)  # type: ignore[attr-defined]
