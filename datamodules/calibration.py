"""Batches to calibrate on, from a file of conversations."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from datamodules.chat import encode, truncate
from datamodules.collate import Batch, collate, pad_id_of
from datamodules.files import read_conversations

BATCH_SIZE = 8


def batches_from(
    conversations: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_conversations: int = 128,
    max_length: int = 512,
) -> list[Batch]:
    """The first conversations of a file, those of similar length together.

    Args:
        conversations: JSONL or Parquet file with `messages`, or `prompt` and `response`.
        tokenizer: With a chat template.
        num_conversations: How many to read.
        max_length: Tokens kept of each.

    Raises:
        FileNotFoundError, ValueError: The file is missing, broken, or holds no conversation that is short enough.
    """
    records = read_conversations(str(conversations), default_split="train")[:num_conversations]
    examples = [truncate(example, max_length=max_length) for example in encode(tokenizer, records)]
    kept = sorted((example for example in examples if example is not None), key=len)
    if not kept:
        raise ValueError(
            f"expected conversations of at most {max_length} tokens before their answer in {str(conversations)!r}, found none; "
            "choose others"
        )
    pad_id = pad_id_of(tokenizer)
    return [collate(kept[start : start + BATCH_SIZE], pad_id=pad_id) for start in range(0, len(kept), BATCH_SIZE)]
