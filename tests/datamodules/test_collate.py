"""Padding sides, masks and labels."""

import pytest
import torch

from datamodules.chat import Example
from datamodules.collate import IGNORE_INDEX, collate, pad_id_of
from tests.helpers.chat_doubles import byte_tokenizer


def example(ids: list[int], *spans: tuple[int, int], index: int = 0) -> Example:
    return Example(torch.tensor(ids, dtype=torch.int32), spans, f"prompt {index}", f"answer {index}", index)


@pytest.mark.parametrize("pad_id", [0, 2])  # 2 is the end token below: many tokenizers pad with it
def test_two_rows(pad_id: int) -> None:
    end = 2
    batch = collate(
        [example([5, 6, 7, 8, end], (1, 2), (3, 5), index=4), example([9, end], (1, 2), index=1)], pad_id=pad_id
    )
    p, i = pad_id, IGNORE_INDEX
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, end], [9, end, p, p, p]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[i, 6, i, 8, end], [i, end, i, i, i]]
    assert batch["prompt_ids"].tolist() == [[5, 6, 7], [p, p, 9]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert (batch["prompts"], batch["answers"]) == (["prompt 4", "prompt 1"], ["answer 4", "answer 1"])
    assert batch["index"] == [4, 1]
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5
    assert all(tensor.dtype == torch.long for tensor in tensors)


def test_pad_token_or_else_the_end_token() -> None:
    tokenizer = byte_tokenizer(pad_token="<|pad|>")
    assert pad_id_of(tokenizer) == tokenizer.convert_tokens_to_ids("<|pad|>")
    tokenizer.pad_token = None
    assert pad_id_of(tokenizer) == tokenizer.eos_token_id
