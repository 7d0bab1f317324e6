"""Judging and timing the students of a study.

Legend: N answer tokens, V vocabulary.
"""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from benchmarks.workers import clocks
from datamodules import ReasoningTasks
from models.copies import inference_copy
from models.evaluation.answers import evaluate
from models.forward import answer_logits
from models.generation.decoder import decoder_for
from models.generation.rollout import rollout, rollout_batch
from models.generation.sampling import Sampling, seed_of
from models.loading.reference import end_token_ids
from models.losses import forward_kl, reverse_kl
from models.student import StudentModule
from models.teacher import RememberingTeacher, Teacher

# Of the held-out questions, every so many-th is also answered by sampling: reading own answers costs as much as all the rest.
OWN_STRIDE = 2


class Judge:
    """Figures of students on held-out questions; the teacher reads each gold answer once.  Half precision judges in bfloat16."""

    def __init__(self, teacher: str, data: ReasoningTasks, *, tokens: int, precision: str) -> None:
        self.data, self.tokens = data, tokens
        self.dtype = torch.float32 if str(precision).startswith(("32", "64")) else torch.bfloat16
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher = Teacher(teacher, dtype=self.dtype).to(self.device)
        self._remembering = {split: RememberingTeacher(self.teacher) for split in ("val", "test")}

    def on_validation(self, student: PreTrainedModel) -> dict[str, float]:
        """`val_kl` and `val_top1_agreement` on gold answers: cheap enough for a learning curve."""
        figures = evaluate(
            student.to(self.device),  # type: ignore[arg-type]  # transformers' decorator hides the signature
            self.data.val_dataloader(),
            tokenizer=self.data.tokenizer,
            teacher=self._remembering["val"],
            dtype=self.dtype,
        )
        return {f"val_{name}": figures[name] for name in ("kl", "top1_agreement")}

    def on_test(self, student: PreTrainedModel) -> dict[str, float]:
        """On gold answers what `models.evaluation.answers.evaluate` says, and on the student's own answers `own_kl`, `own_reverse_kl`."""
        student = student.to(self.device)  # type: ignore[arg-type]
        figures = evaluate(
            student,
            self.data.test_dataloader(),
            tokenizer=self.data.tokenizer,
            teacher=self._remembering["test"],
            scorer=lambda texts, batch: self.data.score(texts, batch, "test"),  # type: ignore[arg-type]
            max_new_tokens=self.tokens,
            dtype=self.dtype,
        )
        return figures | self.on_own_answers(student)

    @torch.no_grad()
    def on_own_answers(self, student: PreTrainedModel) -> dict[str, float]:
        """KL(teacher || student) and KL(student || teacher), nats per token of answers sampled from the student itself.

        Sampled at temperature 1 with one seed for each question, the same for all students; on every `OWN_STRIDE`-th question.
        """
        copy, decoder = inference_copy(student, self.dtype), decoder_for(student, self.dtype)
        kls = {"own_kl": MeanMetric().to(self.device), "own_reverse_kl": MeanMetric().to(self.device)}
        for batch in self.data.test_dataloader():
            batch = move_data_to_device({key: value[::OWN_STRIDE] for key, value in batch.items()}, self.device)
            answers = rollout(
                decoder,
                batch["prompt_ids"],
                batch["prompt_mask"],
                max_new_tokens=self.tokens,
                end_tokens=end_token_ids(student),
                sampling=Sampling(),
                seeds=[seed_of("study", index) for index in batch["index"]],
            )
            batch = rollout_batch(batch, answers)
            logits_NV, teacher_logits_NV = answer_logits(copy, batch), self.teacher.answer_logits(batch)
            kls["own_kl"].update(forward_kl(logits_NV, teacher_logits_NV))
            kls["own_reverse_kl"].update(reverse_kl(logits_NV, teacher_logits_NV))
        return {name: float(metric.compute()) for name, metric in kls.items()}


class TrainingClock(Callback):
    """Seconds of training alone, and the figures of `judge` at some points of it, for which the clock stands still."""

    def __init__(self, judge: Any, points: int) -> None:
        self.judge, self.points = judge, points
        self.curve: list[dict[str, float]] = []
        self.seconds = self.cpu_seconds = 0.0
        self._started = (0.0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: models and data are loaded."""
        self._started = clocks()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it after the last step, and for a look at the student."""
        step, last = trainer.global_step, trainer.max_steps
        if step * self.points // last == (step - 1) * self.points // last:
            return
        wall, cpu = clocks()
        self.seconds += wall - self._started[0]
        self.cpu_seconds += cpu - self._started[1]
        assert isinstance(pl_module, StudentModule)
        self.curve.append({"step": step, "seconds": self.seconds, **self.judge(pl_module.student)})
        self._started = clocks()
