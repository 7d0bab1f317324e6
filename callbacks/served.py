"""Judging graphs as they are served on held-out conversations of the run's data, after the teacher has been let go."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from datamodules.base import ChatDataModule
from export.progress import Phases
from export.runtime import OnnxSession
from export.served import measure_served
from models.forward import Batch
from models.losses import head_of
from models.teacher import Teacher

BATCH_SIZE = 16  # fastest on two cores: activations of more leave the processor's cache


class ServedJudge:
    """What a teacher says about held-out conversations, remembered as hidden states of the answers, for graphs to be compared with.

    Args:
        datamodule: Its test data are judged, or its validation data where there are none.
        teacher: Asked once, and left on the CPU; only its head is kept.
        questions: The first so many conversations of the split.
        max_new_tokens: Length of the answers that are generated, tokens.
    """

    def __init__(self, datamodule: ChatDataModule, teacher: Teacher, questions: int, max_new_tokens: int) -> None:
        split = "test" if datamodule.has_split("test") else "val"
        examples = sorted(datamodule.examples(split)[:questions], key=len)
        collate = datamodule.collate_fn
        starts = range(0, len(examples), BATCH_SIZE)
        self._batches: list[Batch] = [{**collate(examples[start : start + BATCH_SIZE])} for start in starts]
        device = teacher.model.device
        self._hidden = [teacher.answer_hidden(move_data_to_device(batch, device)).cpu() for batch in self._batches]
        self._head = head_of(teacher.to(torch.device("cpu")).model).cut(None, torch.float32)
        self._datamodule, self._split, self._max_new_tokens = datamodule, split, max_new_tokens

    def __call__(self, graphs: Mapping[str, Path], end_tokens: Sequence[int], phases: Phases) -> list[dict[str, Any]]:
        """One row a graph: its `name` and the figures of `export.served.Served`, which see, on the `split`."""
        return [self._row(name, path, end_tokens, phases) for name, path in graphs.items()]

    def _row(self, name: str, path: Path, end_tokens: Sequence[int], phases: Phases) -> dict[str, Any]:
        data, split = self._datamodule, self._split
        with phases.phase(f"Judging as served: {name}", len(self._batches)) as on_batch:
            served = measure_served(
                OnnxSession(path),
                self._batches,
                self._logits,
                tokenizer=data.tokenizer,
                scorer=(lambda texts, batch: data.score(texts, batch, split) or []) if data.has_score else None,
                end_tokens=end_tokens,
                max_new_tokens=self._max_new_tokens,
                on_batch=on_batch,
            )
        return {"name": name, **served.figures(), "split": split}

    def _logits(self, number: int, batch: Batch, positions: Tensor) -> Tensor:
        return self._head.logits(self._hidden[number][positions].float())
