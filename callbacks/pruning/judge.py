"""Distance of the student from its teacher, on the same few batches before and after every change."""

from itertools import islice

import torch
from lightning import Trainer

from callbacks.shared.distributed import share_of_rank
from callbacks.shared.run import data_of
from datamodules.base import ChatDataModule
from datamodules.collate import Batch
from models.evaluation.answers import evaluate
from models.student import StudentModule
from models.teacher import RememberingTeacher, Teacher


class PruningJudge:
    """Measures the KL to a live teacher, or the cross-entropy without one, in nats per answer token, on held-out batches.

    They are validation batches, or else training batches that no event calibrates on (as long as there are enough of
    them). Several devices share the work and get the same figure.  `seed` decides the draw of training batches.
    """

    def __init__(self, num_batches: int, seed: int) -> None:
        self.num_batches = num_batches
        self.seed = seed
        self._batches: list[Batch] = []
        self._teacher: RememberingTeacher | None = None

    def measure(self, module: StudentModule) -> str:
        """What is measured: kl or loss."""
        return "kl" if isinstance(getattr(module, "teacher", None), Teacher) else "loss"

    def __call__(self, trainer: Trainer, module: StudentModule) -> float:
        """The figure of the student as it is now."""
        self._batches = self._batches or self._held_out(data_of(trainer))
        teacher = getattr(module, "teacher", None)
        if self._teacher is None and isinstance(teacher, Teacher):
            self._teacher = RememberingTeacher(teacher)
        with torch.autocast(module.device.type, enabled=False):
            figures = evaluate(
                module.student,
                share_of_rank(trainer, self._batches, len(self._batches)),
                tokenizer=module.tokenizer,
                teacher=self._teacher,
                dtype=module.inference_dtype,
            )
        return figures["kl"] if self._teacher else float(torch.tensor(figures["perplexity"]).log())

    def forget(self) -> None:
        """Let go of batches and teacher."""
        self._batches, self._teacher = [], None

    def calibration_batches(self, data: ChatDataModule, event: int, count: int) -> list[Batch]:
        """Training batches for an event, counted from 1; while data lasts, none that events or the judge saw."""
        skip = (0 if data.has_split("val") else self.num_batches) + (event - 1) * count
        return list(islice(data.calibration_batches(skip + count, self.seed), skip, None))

    def _held_out(self, data: ChatDataModule) -> list[Batch]:
        if not data.has_split("val"):
            return list(data.calibration_batches(self.num_batches, self.seed))
        # The loader sorts by length: take batches from all over it.
        loader = data.val_dataloader()
        assert not isinstance(loader, list)
        count = min(self.num_batches, len(loader))
        wanted = {(2 * number + 1) * len(loader) // (2 * count) for number in range(count)}
        return [batch for number, batch in enumerate(loader) if number in wanted]
