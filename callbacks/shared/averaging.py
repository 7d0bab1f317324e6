"""Averaged weights of a student that changes: Lightning's `WeightAveraging` keeps a copy of the module, which has to follow.

The copy gets the same edits.  Where a repair moved the student's weights, the averages move by as much.
"""

from collections.abc import Iterator, Mapping

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from models.student import StudentModule


def averaged_modules(trainer: Trainer) -> Iterator[StudentModule]:
    """The averaged copies of the module that callbacks keep (`WeightAveraging`, `EMAWeightAveraging`)."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average = callback._average_model.module
            assert isinstance(average, StudentModule)
            yield average


def refuse_averaging(callbacks: list[Callback], expected: str, found: str) -> None:
    """Raise `ValueError` in these words if one of the callbacks averages weights."""
    for callback in callbacks:
        if isinstance(callback, WeightAveraging):
            raise ValueError(f"expected {expected} {type(callback).__name__}, found {found}")


def follow_edits(trainer: Trainer, module: StudentModule) -> None:
    """Apply to the averages the edits of the student that they do not have yet."""
    for average in averaged_modules(trainer):
        average.edit(module.edits[len(average.edits) :])


@torch.no_grad()
def follow_weights(trainer: Trainer, module: StudentModule, before: Mapping[str, Tensor]) -> None:
    """Move the averages by as much as the student's weights have moved since they were `before` (by name)."""
    now = dict(module.student.named_parameters())
    for average in averaged_modules(trainer):
        averages = dict(average.student.named_parameters())
        for name, weight in before.items():
            averages[name].add_((now[name] - weight).to(averages[name].device))
