"""The predictive workload: one prefill, one label token.  A student learns labels, a teacher's view of them, or both.

Only the one position that answers goes through the head, and for the labels only their rows of it.

Legend: B samples of a micro-batch, D hidden, C classes, M models (the student, then the teacher if there is one), V vocabulary.
"""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from datamodules.collate import Batch
from datamodules.ranking import RankingData, RankingExample, most_probable
from models.evaluation.ranking import COLUMNS, RankingMetrics
from models.forward import answer_hidden, answer_labels
from models.loading.reference import vocabulary_size
from models.losses import FullTargets, head_of, logits_of
from models.losses.labels import LabelObjective, label_logits, label_objective
from models.losses.output_head import LazyLogits
from models.offline import is_offline
from models.student import StudentModule, settings_of
from models.teacher import RememberingTeacher, Teacher, TeacherDtype

LABELS_ALONE = LabelObjective()


class RankingDistillation(StudentModule):
    """Train a student to give one label, from the data's labels, from a teacher's probabilities of them, or from both.

    The loss is a mean over the samples of an optimizer step, in nats.  Validation and test judge student and teacher side by side,
    see `RankingMetrics`; prediction gives the probabilities of the labels.

    Args:
        objective: Weighted mix of losses per sample. Without other settings: the data's labels alone.
        teacher: Model to learn from and to be compared with (same tokenizer as the student): folder, hub id, .gguf file or
            package:NAME; none fine-tunes the student on the data's labels.
        teacher_dtype: Teacher's weights: auto is bfloat16 in half-precision training and else float32; int8 keeps its decoder
            layers in 8 bits (one scale per output), which changes its answers a little.
        resamples: Draws behind the 95 % bootstrap intervals of the test's figures; 0 for none.
        kwargs: Settings of StudentModule.

    Raises:
        ValueError: A setting is out of range, or the objective needs a teacher and there is none; (when the models are built) the
            tokenizers differ; (when the data is there) it is no data to rank, or its validation lacks a label.
    """

    def __init__(
        self,
        objective: LabelObjective = LABELS_ALONE,
        teacher: str | None = None,
        teacher_dtype: TeacherDtype = "auto",
        resamples: int = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.objective = settings_of(LabelObjective, objective)
        self.teacher: Teacher | None = None
        self.teacher_reference = teacher or ""
        self.teacher_dtype: TeacherDtype = teacher_dtype
        if self.objective.needs_teacher and not teacher:
            raise ValueError(
                f"expected model.teacher for {' and '.join(self.objective.weights)}, found none; name one, or set label_kl and "
                "full_kl of model.objective to 0"
            )
        if is_offline(self.teacher_reference):
            raise ValueError(
                f"expected a live teacher for ranking, found {teacher!r}; name the teacher's model: with one position a sample it "
                "costs a single forward pass"
            )
        self.labels: tuple[str, ...] = ()
        self.label_tokens_C: Tensor
        self.ranking = nn.ModuleDict({"val": RankingMetrics(), "test": RankingMetrics(resamples)})
        self._remembering: RememberingTeacher | None = None  # of the split to judge: what a teacher says never changes

    # Building -------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the student and, if there is one, a teacher that shares its tokenizer."""
        super().configure_model()
        if getattr(self, "teacher", None) is not None or not self.teacher_reference:
            return
        self.teacher = self.load_teacher(self.teacher_reference, self.teacher_dtype)
        # Heads may be padded beyond the tokenizer, each to another size.
        of_teacher = len(self.teacher.model.get_output_embeddings().weight)
        self.vocabulary = min(vocabulary_size(self.tokenizer), self.vocabulary, of_teacher)

    def setup(self, stage: str) -> None:
        """Learn the labels' tokens from the data, and put them and the teacher where the student will be."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, RankingData):
            found = "none" if data is None else type(data).__name__
            raise ValueError(
                f"expected a data module of samples with labels, found {found}; use Ranking or MovieLens, or write a subclass of "
                "RankingData"
            )
        split = {"fit": "val", "validate": "val", "test": "test"}.get(stage)
        if split and data.has_split(split):
            _check_classes(data, split, stage)
        self.configure_model()
        device = self.trainer.strategy.root_device
        self.labels, self.label_tokens_C = data.labels, data.label_token_ids.to(device)
        if self.teacher:
            self.teacher.to(device)
            # Again for every split: samples of another one have the same numbers.
            self._remembering = RememberingTeacher(self.teacher)

    # Training -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective on one micro-batch."""
        step = self.step_of(batch)
        if step.begins:
            self.step_mean.start(step.answer_tokens)  # one for each sample
        targets = None
        if self.teacher and self.objective.needs_teacher:
            with self.stopwatch("teacher"):
                targets = FullTargets(self.teacher.answer_hidden(batch), head_of(self.teacher.model))
        total, sums = label_objective(
            answer_hidden(self.student, batch),
            head_of(self.student),
            targets,
            answer_labels(batch),
            batch["weights_BC"],
            self.label_tokens_C,
            self.objective,
            vocabulary=self.vocabulary,
            chunk_tokens=self.chunk_tokens,
        )
        for name, value in sums.items():
            self.step_mean.add(f"train/{name}", value)
        return self.share_of_step(total, batch)

    # Evaluation -----------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """One row `{prompt, user, answer, prediction, probabilities}` per sample; probabilities are those among the labels."""
        logits_BC = label_logits(answer_hidden(self.student, batch), head_of(self.student), self.label_tokens_C)
        columns = zip(batch["prompts"], batch["user"], batch["answers"], logits_BC.softmax(-1).tolist(), strict=True)
        return [
            {
                "prompt": prompt,
                "user": user,
                "answer": answer,
                "prediction": self.labels[most_probable(p_C)],
                "probabilities": dict(zip(self.labels, p_C, strict=True)),
            }
            for prompt, user, answer, p_C in columns
        ]

    def _start_evaluation(self) -> None:
        super()._start_evaluation()
        for metrics in self.ranking.values():
            metrics.reset()  # type: ignore[operator]

    def _evaluation_step(self, batch: Batch, split: str) -> None:
        hidden_BD, theirs = answer_hidden(self.student, batch), None
        logits = [label_logits(hidden_BD, head_of(self.student), self.label_tokens_C)]
        if teacher := self._remembering:
            theirs = teacher.lazy_logits(batch, self.vocabulary)
            logits.append(label_logits(teacher.answer_hidden(batch), head_of(teacher.model), self.label_tokens_C))
        ours = LazyLogits(hidden_BD, partial(logits_of, self.student), self.vocabulary)
        self.metrics.update(ours, answer_labels(batch), theirs)
        self.ranking[split].update(torch.stack(logits, 1), batch)  # type: ignore[operator]

    def _end_evaluation(self, split: str) -> dict[str, float]:
        figures = super()._end_evaluation(split)
        values: dict[str, Tensor] = self.ranking[split].compute()  # type: ignore[operator]
        ranking = {f"{split}/{name}": float(value) for name, value in values.items()}
        self.log_dict(ranking)
        if split == "test":
            for name in ("auroc", "user_auroc", "log_loss", "ece"):
                rank_zero_info("%s: %s", name, _in_words(name, values))
        return figures | ranking


def _check_classes(data: RankingData, split: str, stage: str) -> None:
    """Refuse, before training, to validate on a split in which a label never occurs; otherwise warn."""
    examples = [example for example in data.examples(split) if isinstance(example, RankingExample)]
    found = {most_probable(example.weights) for example in examples}
    if missing := [repr(label) for number, label in enumerate(data.labels) if number not in found]:
        sentence = (
            f"expected every label among the {len(examples)} {split} samples, found none with {' or '.join(missing)}: there is no "
            "AUROC without; add some, or remove the label from `labels`"
        )
        if stage == "fit":
            raise ValueError(sentence)
        rank_zero_warn(sentence)


def _in_words(name: str, values: dict[str, Tensor]) -> str:
    """A figure of student and teacher and their difference, with what intervals there are."""
    parts = []
    for whose, column in zip(("student", "teacher", "difference"), COLUMNS, strict=True):
        key = column.format(name)
        if key in values:
            ends = [f"{values[key + end]:.4f}" for end in ("_low", "_high") if key + end in values]
            parts.append(f"{whose} {values[key]:.4f}" + (f" ({' to '.join(ends)})" if ends else ""))
    return ", ".join(parts) or "not known from these samples"
