"""Judging the student at the end of each phase of a run: after pruning, after recovery, after quantization."""

from typing import Annotated, Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.pruning.gradual_pruning import GradualPruning
from callbacks.quantization import QuantizationAwareTraining
from callbacks.shared.distributed import share_of_rank
from callbacks.shared.run import StepBoundary, check_order, data_of
from datamodules.base import ChatDataModule
from models.architecture import count_parameters
from models.evaluation.answers import evaluate
from models.offline import is_offline
from models.student import StudentModule
from models.teacher import RememberingTeacher, Teacher
from program.progress import Bar
from program.ranges import Between, check_arguments


class PhaseEvaluation(Callback):
    """Evaluate teacher and student on a held-out split: parameters, KL to the teacher, agreement and task score.

    Phases are named by what just ended: `pruned` (right after the last pruning event), `recovered` (just before quantizers
    are inserted, or at the end without them), `quantized` (at the end, with them), `trained` (at the end of a run without
    either).  Figures go to the logger as `phase/<name>/...` and into `report.json`; they survive a resume.  Several devices
    share the work.

    Args:
        generate_tokens: Length in tokens of the answers generated for the task score; 0 for none.
        split: Which held-out data: test or val (null: test if there is such a split, else val).

    Raises:
        ValueError: The data module has no such split, or is no `ChatDataModule`.
    """

    needs_whole_student = True

    def __init__(
        self, generate_tokens: Annotated[int, Between(0, 1e6)] = 64, split: Literal["test", "val"] | None = None
    ) -> None:
        check_arguments(PhaseEvaluation.__init__, locals(), "PhaseEvaluation.")
        self.generate_tokens = generate_tokens
        self.wanted = split
        #: The split that is judged.
        self.split: str = split or "test"
        self.phases: list[dict[str, Any]] = []
        self.teacher_figures: dict[str, Any] = {}
        self.constant_answer_score: float | None = None
        self._pruning: GradualPruning | None = None
        self._quantize_at: int | None = None
        self._teacher: RememberingTeacher | None = None
        self._boundary = StepBoundary()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read from the other callbacks when their phases end."""
        if stage != "fit":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        check_order(callbacks)
        if is_offline(getattr(pl_module, "teacher_reference", "")):
            raise ValueError(
                "expected a live teacher for PhaseEvaluation, found a captured one; name the teacher's model, or leave the "
                "callback out and read the validation's figures"
            )
        self.split = self._choose_split(data_of(trainer))
        instead = "" if self.wanted or self.split == "test" else ": there is no test data"
        rank_zero_info(f"Phases are judged on the {self.split} split{instead}")
        self._pruning = next((c for c in callbacks if isinstance(c, GradualPruning)), None)
        quantization = next((c for c in callbacks if isinstance(c, QuantizationAwareTraining)), None)
        self._quantize_at = quantization.start_step if quantization else None

    def _choose_split(self, data: ChatDataModule) -> str:
        candidates = [self.wanted] if self.wanted else ["test", "val"]
        chosen = next((split for split in candidates if data.has_split(split)), None)
        if chosen is None:
            raise ValueError(
                f"expected {' or '.join(candidates)} data for PhaseEvaluation, found none; set data.init_args.{candidates[0]}, or "
                "leave PhaseEvaluation out"
            )
        return chosen

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge a phase that a checkpoint was saved too early for; one that was judged before is not judged again."""
        self._boundary.start(trainer.global_step)
        self._judge_what_ended(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the student if a phase ends after this optimizer step."""
        if self._boundary.passed(trainer.global_step):
            self._judge_what_ended(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the final student, and the teacher for comparison."""
        self._judge_student(trainer, pl_module, "quantized" if self._quantize_at else self._unquantized)
        if self._teacher is not None:
            model = self._teacher.model
            figures = self._figures(trainer, pl_module, model, "teacher")
            self.teacher_figures = {"name": "teacher", "parameters": count_parameters(model), **figures}
            self.constant_answer_score = data_of(trainer).constant_answer_score(self.split)
        self._teacher = None

    def state_dict(self) -> dict[str, Any]:
        """The figures so far."""
        return {
            "phases": self.phases,
            "teacher": self.teacher_figures,
            "constant_answer_score": self.constant_answer_score,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the figures so far."""
        self.phases = state_dict["phases"]
        self.teacher_figures = state_dict["teacher"]
        self.constant_answer_score = state_dict["constant_answer_score"]

    @property
    def _unquantized(self) -> str:
        return "recovered" if self._pruning else "trained"

    def _judge_what_ended(self, trainer: Trainer, module: LightningModule) -> None:
        judged = {phase["name"] for phase in self.phases}
        if self._pruning is not None and self._pruning.finished and "pruned" not in judged:
            self._judge_student(trainer, module, "pruned")
        if trainer.global_step == self._quantize_at and self._unquantized not in judged:
            self._judge_student(trainer, module, self._unquantized)

    def _judge_student(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        assert isinstance(module, StudentModule)
        figures = self._figures(trainer, module, module.student, name)
        phase = {"name": name, "step": trainer.global_step, "parameters": count_parameters(module.student), **figures}
        self.phases = [known for known in self.phases if known["name"] != name] + [phase]
        numbers = {f"phase/{name}/{key}": value for key, value in phase.items() if isinstance(value, int | float)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        rank_zero_info(f"Phase {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def _figures(self, trainer: Trainer, module: LightningModule, model: Any, name: str) -> dict[str, float]:
        assert isinstance(module, StudentModule)
        datamodule: Any = data_of(trainer)  # its batches are typed dicts, the models' are plain
        datamodule.setup("test" if self.split == "test" else "validate")
        loader = getattr(datamodule, f"{self.split}_dataloader")()
        batches = Bar(share_of_rank(trainer, loader, len(loader)), desc=f"Judging: {name}", unit="batches", leave=False)
        teacher = getattr(module, "teacher", None)
        if self._teacher is None and isinstance(teacher, Teacher):
            self._teacher = RememberingTeacher(teacher)
        with torch.autocast(module.device.type, enabled=False):
            return evaluate(
                model,
                batches,
                tokenizer=module.tokenizer,
                teacher=self._teacher,
                scorer=(lambda texts, batch: datamodule.score(texts, batch, self.split))
                if datamodule.has_score
                else None,
                max_new_tokens=self.generate_tokens,
                dtype=module.inference_dtype,
            )
