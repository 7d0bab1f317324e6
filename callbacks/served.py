"""Held-out conversations of a run's data, and what its teacher says about them, for graphs to be judged after the teacher was let go."""

from typing import Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from datamodules.base import ChatDataModule
from datamodules.chat import Example
from datamodules.collate import Batch
from export.verify import HeldOut
from models.losses import head_of
from models.teacher import Teacher

BATCH_SIZE = 16  # fastest on two cores: activations of more leave the processor's cache


def split_of(datamodule: ChatDataModule) -> str:
    """What is judged: test data, validation data where there are none."""
    return "test" if datamodule.has_split("test") else "val"


def examples_of(datamodule: ChatDataModule, questions: int) -> list[Example]:
    """The first conversations of it."""
    return datamodule.examples(split_of(datamodule))[:questions]


def held_out_of(datamodule: ChatDataModule, teacher: Teacher, questions: int, max_new_tokens: int) -> HeldOut:
    """The first test conversations (validation where there are none), those of similar length together, judged by a teacher.

    Args:
        datamodule: Has test or validation data.
        teacher: Asked once, and left on the CPU; hidden states of the answers and its head are kept.
        questions: How many conversations.
        max_new_tokens: Length of the answers that are generated, tokens.
    """
    split = split_of(datamodule)
    examples = sorted(examples_of(datamodule, questions), key=len)
    collate, starts = datamodule.collate_fn, range(0, len(examples), BATCH_SIZE)
    batches: list[Batch] = [{**collate(examples[start : start + BATCH_SIZE])} for start in starts]
    device = teacher.model.device
    hidden = [teacher.answer_hidden(move_data_to_device(batch, device)).cpu() for batch in batches]
    head = head_of(teacher.to(torch.device("cpu")).model).cut(None, torch.float32)

    scores: Any = datamodule.score  # its batches are typed dicts, the models' are plain

    def judge(number: int, batch: Batch, positions_n: Tensor) -> Tensor:
        return head.logits(hidden[number][positions_n].float())

    return HeldOut(
        batches,
        judge,
        tokenizer=datamodule.tokenizer,
        scorer=(lambda texts, batch: scores(texts, batch, split) or []) if datamodule.has_score else None,
        max_new_tokens=max_new_tokens,
    )
