"""Sampling answers from a model: a left-padded batch, a key/value cache, and a generator of its own.

The generator makes a rollout a pure function of (weights, prompts, seed), so that a resumed run samples the same tokens
without any saved random state.  Sampling is never differentiated.

Legend: B samples, P prompt tokens, G generated tokens, T = P + G, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.forward import IGNORE, Batch


@dataclass(frozen=True)
class Rollout:
    """Generated tokens (B, G) and their mask (B, G): 1 up to and including the first end token, 0 after it."""

    tokens_BG: Tensor
    mask_BG: Tensor


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
    prompts_BP: Tensor,
    mask_BP: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    end_tokens: Sequence[int],
    generator: torch.Generator | None = None,
    vocabulary: int | None = None,
) -> Rollout:
    """Sample one answer for every prompt.

    Args:
        model: Causal language model in evaluation mode; its dtype is the dtype of the computation.
        prompts_BP: Left-padded prompt tokens.
        mask_BP: 1 for prompt tokens, 0 for padding.
        max_new_tokens: Number of tokens at most.
        temperature: Sampling temperature; 0 takes the most probable token.
        end_tokens: Tokens that end an answer.
        generator: Source of randomness, on the device of the prompts; not needed at temperature 0.
        vocabulary: Sample only the first so many tokens, for heads padded beyond what a teacher knows; None takes all.
    """
    cache = DynamicCache(config=model.config)
    ends = torch.tensor(list(end_tokens), device=prompts_BP.device)
    mask_BT, positions_BP = mask_BP, (mask_BP.cumsum(1) - 1).clamp(min=0)
    alive_B = torch.ones(len(prompts_BP), dtype=torch.bool, device=prompts_BP.device)
    tokens: list[Tensor] = []
    masks: list[Tensor] = []
    inputs_BP = prompts_BP
    for _ in range(max_new_tokens):
        hidden_BPD = model.base_model(
            input_ids=inputs_BP,
            attention_mask=mask_BT,
            position_ids=positions_BP,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        # Two dimensions on purpose: on a strided (B, 1, D) input, torch would copy the frozen head once per sample.
        token_B = _sample(model.get_output_embeddings()(hidden_BPD[:, -1])[:, :vocabulary], temperature, generator)
        tokens.append(token_B)
        masks.append(alive_B.long())
        alive_B = alive_B & ~torch.isin(token_B, ends)
        if not alive_B.any():
            break
        mask_BT = torch.cat([mask_BT, masks[-1][:, None]], dim=1)
        positions_BP = positions_BP[:, -1:] + 1
        inputs_BP = token_B[:, None]
    return Rollout(torch.stack(tokens, dim=1), torch.stack(masks, dim=1))


def rollout_batch(batch: Batch, answers: Rollout) -> Batch:
    """The batch with its gold answers replaced by sampled ones: right-padded inputs, labels on generated tokens only."""
    mask_BT = torch.cat([batch["prompt_mask"], answers.mask_BG], dim=1)
    tokens_BT = torch.cat([batch["prompt_ids"], answers.tokens_BG], dim=1)
    is_answer_BT = torch.cat([torch.zeros_like(batch["prompt_mask"]), answers.mask_BG], dim=1)
    labels_BT = torch.where(is_answer_BT.bool(), tokens_BT, IGNORE)
    # Real tokens move to the front of their row, in order; padding goes to the back.
    order_BT = torch.argsort(mask_BT, dim=1, descending=True, stable=True)[:, : int(mask_BT.sum(1).max())]
    return {
        **batch,
        "input_ids": tokens_BT.gather(1, order_BT),
        "attention_mask": mask_BT.gather(1, order_BT),
        "labels": labels_BT.gather(1, order_BT),
    }


def answer_texts(tokenizer: object, answers: Rollout) -> list[str]:
    """Generated answers as text, without special tokens."""
    rows = [tokens[mask.bool()].tolist() for tokens, mask in zip(answers.tokens_BG, answers.mask_BG, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)  # type: ignore[attr-defined]


def _sample(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BV = torch.softmax(logits_BV.float() / temperature, dim=-1)
    return torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(1)
