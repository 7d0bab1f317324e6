"""A short way to a `Distillation` of tiny models, and the loss of a batch written out by hand."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import IGNORE_INDEX, Batch
from models import Distillation
from models.forward import answer_hidden, answer_labels
from models.generation.on_policy import OnPolicy
from models.losses import FullTargets, Objective, head_of
from tests.helpers.loss_references import reference

KNOWN = 260  # tokens of the tokenizer; the tiny models' heads have 300 rows
SGD = partial(torch.optim.SGD, lr=0.1)
OWN = OnPolicy(start=0, tokens=6)


def distil(student: str, teacher: str, **settings: Any) -> Distillation:
    settings = {"optimizer": partial(torch.optim.AdamW, lr=1e-2), "generate_tokens": 0} | settings
    return Distillation(teacher=teacher, student=student, **settings)


def loss_by_hand(
    model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, objective: Objective, known: int = KNOWN
) -> tuple[Tensor, dict[str, float]]:
    """An objective's mean over the batch's answer tokens, and its parts, in float64, over the tokens both models know."""
    labels = answer_labels(batch)
    with torch.no_grad():
        targets = FullTargets(answer_hidden(teacher, batch), head_of(teacher))
    lengths = (batch["labels"] != IGNORE_INDEX).sum(1).tolist()
    hidden = answer_hidden(model, batch)
    total, sums = reference(hidden, head_of(model), targets, labels, objective, known, lengths)
    return total / len(labels), {name: float(value) / len(labels) for name, value in sums.items()}


def assert_same_weights(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)
