"""Distillation in two stages as one schedule (GKD, arXiv 2306.13649; order of stages as in arXiv 2502.14305).

Stage 1: word-level divergence to the teacher on the answers of the data.  Stage 2: the same on answers that the student gives
itself.  Which stage a step belongs to is a draw whose probability is a function of the optimizer step, so one `fit` runs both.

Legend: N answer tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.collate import Batch, OptimizerStep
from models.evaluation.answers import AnswerMetrics
from models.forward import answer_hidden, answer_labels, answer_lengths, answer_states
from models.generation.decoder import decoder_for
from models.generation.on_policy import OnPolicy, OnPolicyAnswers, Source, check_course, check_policy_gradient
from models.generation.rollout import Rollout, rollout_batch
from models.generation.sampling import Sampling
from models.loading.reference import end_token_ids, vocabulary_size
from models.losses import Objective, Targets, check_stored_top_k, head_of, hidden_state_loss, linear_objective
from models.losses.hidden_states import check_hidden_states
from models.losses.output_head import LazyLogits
from models.offline import OfflineTeacher, is_offline, open_offline_teacher
from models.offline.teacher import check_offline
from models.student import StudentModule, settings_of
from models.teacher import Teacher, TeacherDtype
from program.ranges import Between, check_arguments

FORWARD_KL, NEVER, PLAIN = Objective(), OnPolicy(), Sampling()  # defaults; all three are frozen


class Distillation(StudentModule):
    """Distil a frozen teacher into the student, on the data's answers first, then on the student's own.

    Args:
        teacher: Model to learn from (same tokenizer as the student): folder, hub id, .gguf file or package:NAME; or
            offline:FOLDER for a teacher's captured answers (see `python -m models.offline --help`).
        objective: Weighted mix of per-token losses on the answers of the data (stage 1).
        on_policy_objective: The same for the student's own answers (stage 2); none takes objective without cross_entropy.
        on_policy: When the student answers for itself, how long, and whether answers are replayed.
        sampling: How the student samples its own answers; independent of the objective's temperature.
        hidden_state_weight: Weight of the distance between hidden states of student and teacher, added to the objective; 0 for none.
        hidden_state_layers: Decoder layers of the student and the teacher's layers they learn from, both counted from 0; of the last
            layer, the output after the final norm.
        teacher_dtype: Teacher's weights: auto is bfloat16 in half-precision training and else float32; int8 keeps its decoder
            layers in 8 bits (one scale per output), which changes its answers a little.
        kwargs: Settings of StudentModule.

    Raises:
        ValueError: A setting is out of range or asks a captured teacher for what it cannot say; (when the models are built) the
            tokenizers differ; (when the data is there) the teacher was captured on other data.
    """

    def __init__(
        self,
        teacher: str,
        objective: Objective = FORWARD_KL,
        on_policy_objective: Objective | None = None,
        on_policy: OnPolicy = NEVER,
        sampling: Sampling = PLAIN,
        hidden_state_weight: Annotated[float, Between(0)] = 0.0,
        hidden_state_layers: dict[int, int] | None = None,
        teacher_dtype: TeacherDtype = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_arguments(Distillation.__init__, locals(), "model.")
        self.teacher: Teacher | OfflineTeacher
        self.teacher_reference = teacher
        self.teacher_dtype: TeacherDtype = teacher_dtype
        objective = settings_of(Objective, objective)
        on_policy_objective = settings_of(Objective, on_policy_objective or _without_gold(objective))
        self.objectives: dict[Source, Objective] = {
            "dataset": objective,
            "fresh": on_policy_objective,
            "replay": on_policy_objective,
        }
        self.own_answers = OnPolicyAnswers(settings_of(OnPolicy, on_policy), settings_of(Sampling, sampling))
        self.hidden_state_weight = hidden_state_weight
        self.hidden_state_layers = {int(ours): int(theirs) for ours, theirs in (hidden_state_layers or {}).items()}
        check_hidden_states(hidden_state_weight, self.hidden_state_layers)
        check_policy_gradient(self.objectives, self.own_answers.settings)
        check_offline(
            self.teacher_reference,
            {
                "on_policy.start": self.own_answers.settings.start >= 0,
                "hidden_state_layers": bool(self.hidden_state_layers),
                "teacher_dtype": self.teacher_dtype != "auto",
            },
        )
        self._source: Source = "dataset"  # of this optimizer step's answers
        self._rolled: list[tuple[Batch, Rollout]] = []  # the student's own, of all micro-batches of this optimizer step
        self._teacher_metrics: AnswerMetrics | None = AnswerMetrics()

    def configure_model(self) -> None:
        """Load student and teacher, and refuse a pair that does not share a tokenizer."""
        super().configure_model()
        if hasattr(self, "teacher") or is_offline(self.teacher_reference):
            return  # `setup` opens a captured one: it has to match the data
        self.teacher = self.load_teacher(
            self.teacher_reference, self.teacher_dtype, generate_tokens=self.generate_tokens
        )
        self._agree_on_vocabulary(len(self.teacher.model.get_output_embeddings().weight))

    def _agree_on_vocabulary(self, teacher: int) -> None:
        """Heads may be padded beyond the tokenizer, each to another size: only true tokens take part, on both sides."""
        student = self.vocabulary
        self.vocabulary = min(vocabulary_size(self.tokenizer), student, teacher)
        if not student == teacher == self.vocabulary:
            rank_zero_info(
                "Of the heads' rows (student %d, teacher %d), the tokenizer's %d tokens take part; the rest is padding",
                student,
                teacher,
                self.vocabulary,
            )

    def setup(self, stage: str) -> None:
        """Put the teacher where the student will be."""
        if stage == "fit":
            check_course(self.own_answers.settings, self.trainer)
        self.configure_model()
        if is_offline(self.teacher_reference) and stage != "predict":
            self.teacher = self._open_offline(stage)
            self._agree_on_vocabulary(self.teacher.vocabulary)
        if hasattr(self, "teacher"):
            self.teacher.to(self.trainer.strategy.root_device)

    def _open_offline(self, stage: str) -> OfflineTeacher:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            raise ValueError(
                f"expected a data module for {self.teacher_reference!r}, to compare it with what was captured, found loaders "
                "alone; give the trainer the data module"
            )
        teacher = open_offline_teacher(
            self.teacher_reference, datamodule, {"validate": ("val",), "test": ("test",)}.get(stage)
        )
        if teacher.top_k is not None:
            objective = self.objectives["dataset"]
            weights = {"top_k_kl": 1.0} | (objective.weights if stage == "fit" else {})  # evaluation has its own
            check_stored_top_k(replace(objective, weights=weights), teacher.top_k)
        return teacher

    # Training -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective of the optimizer step's source of answers, on one micro-batch."""
        step = self.step_of(batch)
        if step.begins:
            self._begin_step(step)
        batch = self._with_answers(batch, step)
        with self.stopwatch("teacher"):
            targets, their_states = self._ask_teacher(batch)
        return self.share_of_step(self._loss(batch, targets, their_states), batch)

    def _begin_step(self, step: OptimizerStep) -> None:
        """Draw where the answers come from, once a step, and sample the student's own for all its micro-batches."""
        self._source = self.own_answers.source(self.global_step, self.trainer.max_steps)
        if self._source == "dataset":
            self.step_mean.start(step.answer_tokens)
            return
        with self.stopwatch("rollout"):
            self._rolled = self.own_answers.answers(
                self._source,
                step.batches,
                self.global_step,
                self.global_rank,
                lambda: decoder_for(self.student, self.inference_dtype),
                end_tokens=end_token_ids(self.student),
                vocabulary=self.vocabulary,
            )
        lengths = [length for _, answers in self._rolled for length in answers.lengths]
        self.step_mean.start(sum(lengths))
        self.log("train/rollout_tokens", torch.full((), sum(lengths) / len(lengths), device=self.device))

    def _with_answers(self, batch: Batch, step: OptimizerStep) -> Batch:
        """The micro-batch with the answers to learn from."""
        if self._source == "dataset":
            return batch
        prompts, answers = self._rolled[step.position]
        return {**batch, **rollout_batch(prompts, answers)}

    def _ask_teacher(self, batch: Batch) -> tuple[Targets, list[Tensor]]:
        if isinstance(self.teacher, OfflineTeacher):
            return self.teacher.targets(batch, "train"), []
        return self.teacher.targets(batch, layers=self.hidden_state_layers.values())

    def _loss(self, batch: Batch, targets: Targets, their_states: Sequence[Tensor]) -> Tensor:
        """The objective, summed over the answer tokens of a micro-batch."""
        objective = self.objectives[self._source]
        hidden_ND, our_states = answer_states(self.student, batch, layers=self.hidden_state_layers)
        total, sums = self._compare(hidden_ND, targets, batch, objective)
        for ours_ND, theirs_ND in zip(our_states, their_states, strict=True):
            distance = hidden_state_loss(ours_ND, theirs_ND).sum() / len(our_states)
            total = total + self.hidden_state_weight * distance
            self.step_mean.add("train/hidden_states", distance)
        for name, value in sums.items():
            self.step_mean.add(f"train/{name}_{'dataset' if self._source == 'dataset' else 'on_policy'}", value)
        return total

    def _compare(
        self, hidden_ND: Tensor, targets: Targets, batch: Batch, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """An objective summed over answer tokens, and each of its losses; see `linear_objective`."""
        return linear_objective(
            hidden_ND,
            head_of(self.student),
            targets,
            answer_labels(batch),
            objective,
            vocabulary=self.vocabulary,
            chunk_tokens=self.chunk_tokens,
            sequence_lengths=answer_lengths(batch) if objective.discount else None,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the draws of stage 2 depend on: each rank's own replay buffer, and the adaptive share."""
        super().on_save_checkpoint(checkpoint)
        states: list[Any] = [self.own_answers.state_dict()] * (self._trainer.world_size if self._trainer else 1)
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(states, self.own_answers.state_dict())
        checkpoint["on_policy"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the replay buffer of this rank."""
        super().on_load_checkpoint(checkpoint)
        states = checkpoint.get("on_policy") or []  # SFT has none
        if states:
            self.own_answers.load_state_dict(states[(self.global_rank if self._trainer else 0) % len(states)])

    # Evaluation -----------------------------------------------------------------------------------------------------

    def teacher_logits(self, batch: Batch, split: str) -> LazyLogits | None:
        """Teacher's logits at the answer positions, over the common vocabulary; None where only its top tokens are known."""
        if not isinstance(self.teacher, OfflineTeacher):
            return self.teacher.lazy_logits(batch, self.vocabulary)
        return None if self.teacher.form == "top_k" else self.teacher.lazy_logits(batch, split, self.vocabulary)

    def _start_evaluation(self) -> None:
        super()._start_evaluation()
        if self._teacher_metrics is not None:
            self._teacher_metrics.reset()

    def _evaluation_step(self, batch: Batch, split: str) -> None:
        super()._evaluation_step(batch, split)
        if self._teacher_metrics is not None:
            self._judge_teacher(self._teacher_metrics.to(self.device), batch, split)
        if isinstance(self.teacher, OfflineTeacher) and self.teacher.form == "top_k":
            self._judge_by_top_k(self.teacher.targets(batch, split), batch)

    def _judge_by_top_k(self, targets: Targets, batch: Batch) -> None:
        objective = replace(self.objectives["dataset"], weights={"top_k_kl": 1.0})
        hidden_ND = answer_hidden(self.student, batch)
        total, _ = self._compare(hidden_ND, targets, batch, objective)
        self.metrics.top_k_kl.update(total / len(hidden_ND), weight=len(hidden_ND))

    def _judge_teacher(self, metrics: AnswerMetrics, batch: Batch, split: str) -> None:
        logits = self.teacher_logits(batch, split)
        if logits is not None:
            metrics.update(logits, answer_labels(batch), None)
        if isinstance(self.teacher, Teacher):  # a captured one can say nothing new
            self._score(self.teacher.model, metrics, batch, split)

    def _end_evaluation(self, split: str) -> dict[str, float]:
        figures = super()._end_evaluation(split)
        if split == "val" and not self.trainer.sanity_checking:
            self.own_answers.validated(math.log(figures["val/perplexity"]))
        if self._teacher_metrics is not None and not self.trainer.sanity_checking:
            if theirs := {f"{split}/teacher_{k}": value for k, value in self._teacher_metrics.compute().items()}:
                self.log_dict(theirs)
                rank_zero_info("The teacher's own figures: %s", ", ".join(f"{k} {v:.4f}" for k, v in theirs.items()))
            self._teacher_metrics = None  # once is enough: the teacher never changes
        return figures


def _without_gold(objective: Objective) -> Objective:
    """The objective for answers that nobody calls right: without cross-entropy, if there is anything else."""
    weights = {name: weight for name, weight in objective.weights.items() if name != "cross_entropy"}
    return replace(objective, weights=weights or objective.weights)
