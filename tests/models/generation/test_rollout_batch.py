"""Batches made of rollouts."""

import torch
from transformers import PreTrainedModel

from datamodules.collate import IGNORE_INDEX, Batch
from models.forward import answer_labels
from models.generation.rollout import Rollout, answer_texts, pad_left, rollout_batch
from tests.helpers.chat_doubles import byte_tokenizer
from tests.helpers.rollouts import prompts_of, roll


def test_rollout_batch_by_hand() -> None:
    batch = {
        "prompt_ids": torch.tensor([[9, 9, 11], [21, 22, 23]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
        "input_ids": torch.zeros(2, 9).long(),
        "prompts": ["a", "b"],
        "index": [4, 2],
    }
    answers = Rollout(torch.tensor([[31, 1, 77], [41, 42, 43]]), [2, 3])
    ours = rollout_batch(batch, answers)
    assert ours["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert ours["input_ids"][0, :3].tolist() == [11, 31, 1]
    assert ours["input_ids"][1].tolist() == [21, 22, 23, 41, 42, 43]
    assert ours["labels"].tolist() == [[IGNORE_INDEX, 31, 1, *[IGNORE_INDEX] * 3], [*[IGNORE_INDEX] * 3, 41, 42, 43]]
    assert (ours["prompts"], ours["index"]) == (["a", "b"], [4, 2])
    assert batch["input_ids"].shape == (2, 9), "the batch given stays as it was"


def test_rollout_batch_is_no_wider_than_its_longest_row(model: PreTrainedModel, batch: Batch) -> None:
    free = roll(model, batch).tokens_BG
    answers = roll(model, batch, end_tokens=[int(free[1, 2]), int(free[2, 6])])
    ours = rollout_batch(batch, answers)
    lengths = batch["prompt_mask"].sum(1) + answers.mask_BG.sum(1)
    assert ours["input_ids"].shape[1] == lengths.max() < batch["prompt_ids"].shape[1] + answers.mask_BG.shape[1]
    assert torch.equal(ours["attention_mask"].sum(1), lengths)
    assert (ours["attention_mask"].diff(dim=1) <= 0).all()  # padding stands on the right
    assert torch.equal(answer_labels(ours), answers.tokens_BG[answers.mask_BG.bool()])  # the end token included
    for row, prompt in enumerate(prompts_of(batch)):
        assert ours["input_ids"][row, : len(prompt)].tolist() == prompt
        assert (ours["labels"][row, : len(prompt)] == IGNORE_INDEX).all()


def test_rollout_batch_of_gold_answers_is_the_batch(batch: Batch) -> None:
    """The loader's own collation and ours agree when the 'generated' tokens are the gold ones."""
    labels = [row[row != IGNORE_INDEX] for row in batch["labels"]]
    width = max(len(row) for row in labels)
    tokens = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=1) for row in labels])
    ours = rollout_batch(batch, Rollout(tokens, [len(row) for row in labels]))
    assert ours["answer_spans"] == batch["answer_spans"]
    for key in ("input_ids", "attention_mask", "labels"):
        visible = batch["attention_mask"].bool()
        assert torch.equal(ours[key][visible], batch[key][visible])


def test_texts_hold_no_special_tokens_and_no_padding() -> None:
    tokenizer = byte_tokenizer()
    hello = tokenizer("hello", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[*hello, 1, 50], [*hello, *hello[:2]]])
    assert answer_texts(tokenizer, Rollout(tokens, [6, 7])) == ["hello", "hellohe"]


def test_pad_left_by_hand() -> None:
    padded = pad_left([torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5], [6, 7, 8]])])
    assert padded.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
