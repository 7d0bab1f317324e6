"""The prompts that an exported file is verified on: the user's own, or a few that come along."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.chat import Conversation, encode
from datamodules.files import read_conversations

PROMPTS = (
    "What is 7 plus 5?",
    "Name the capital of France.",
    "Write one short sentence about rain.",
    "Is the statement 'all cats are animals' true or false? Answer with one word and then give the reason for your answer.",
    "List three colours.",
    "A train leaves at 9:40 and arrives at 11:05. How long does the journey take? Think step by step, then answer.",
    "Translate 'good morning' into Spanish.",
    "Summarize in one sentence: the sun warms the sea, water rises as vapour, cools down, forms clouds and falls as rain.",
)


def prompts_for_verification(
    tokenizer: PreTrainedTokenizerBase, conversations: Path | None, number: int
) -> dict[str, Tensor]:
    """The first prompts as a left-padded batch.

    Args:
        tokenizer: One without chat template gets the last message before each answer as it is.
        conversations: JSONL or Parquet file with `messages`, or `prompt` and `response`; None: `PROMPTS`.
        number: How many.

    Returns:
        `prompt_ids` (B, P) and `prompt_mask` (B, P).

    Raises:
        FileNotFoundError, ValueError: The file is missing or broken, or there are not so many.
    """
    if conversations is None:
        turns = [[{"role": "user", "content": each}, {"role": "assistant", "content": "."}] for each in PROMPTS]
        found = [Conversation(messages, "export/verify/prompts.py") for messages in turns]
    else:
        found = read_conversations(str(conversations), default_split="train")
    if number > len(found):
        place = "that come along" if conversations is None else f"in {str(conversations)!r}"
        raise ValueError(
            f"expected at most {len(found)} prompts to verify on, those {place}, found --prompts {number}; ask for fewer, or name a "
            "longer file with --verify-on"
        )
    if tokenizer.chat_template:
        rows = [example.input_ids[: example.prompt_length].long() for example in encode(tokenizer, found[:number])]
    else:
        rows = [torch.tensor(tokenizer(each.prompt[-1]["content"])["input_ids"]) for each in found[:number]]
    padded = partial(pad_sequence, batch_first=True, padding_side="left")
    masks = padded([torch.ones_like(row) for row in rows], padding_value=0)
    return {"prompt_ids": padded(rows, padding_value=tokenizer.pad_token_id or 0), "prompt_mask": masks}


def check_room(
    model: PreTrainedModel, prompts: Mapping[str, Tensor], decode_steps: int, benchmark_prompt: int = 1
) -> None:
    """Raise `ValueError` for more tokens than the model has positions for: they say nothing about it, and take for ever."""
    positions, longest = getattr(model.config, "max_position_embeddings", None), prompts["prompt_ids"].shape[1]
    if positions is not None and longest + decode_steps > positions:
        raise ValueError(
            f"expected prompts and decode steps within the {positions} positions of the model, found prompts of up to {longest} tokens and "
            f"{decode_steps} steps; lower --decode-steps, or verify on shorter prompts"
        )
    if positions is not None and benchmark_prompt > positions:
        raise ValueError(
            f"expected a prompt of the benchmark within the {positions} positions of the model, found {benchmark_prompt}; lower --benchmark-prompt"
        )
