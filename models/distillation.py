"""Distillation in two stages as one schedule (GKD, arXiv 2306.13649; order of stages as in arXiv 2502.14305).

Stage 1: word-level divergence to the teacher on the answers of the data, plus cross-entropy if asked for.
Stage 2: the same on answers that the student samples itself.  Which stage a step belongs to is a draw whose probability is a
function of the optimizer step, so one `fit` runs both, and a resumed run needs no saved state.

Legend: N answer tokens, V vocabulary.
"""

from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from models.evaluation import AnswerMetrics
from models.forward import Batch, answer_labels, answer_logits, inference_copy
from models.losses import Divergence, divergence
from models.pretrained import check_same_tokenizer, end_token_ids, load_tokenizer
from models.rollout import rollout, rollout_batch
from models.student import StudentModule, seed_of
from models.teacher import Teacher

TeacherDtype = Literal["auto", "float32", "bfloat16", "int8"]
FLOATS = ("float32", "bfloat16")


class Distillation(StudentModule):
    """Distil a frozen teacher into the student, on the data's answers first, then on the student's own.

    Args:
        teacher: Model to learn from (same tokenizer as the student): folder, hub id, .gguf file or package:NAME.
        divergence: Per-token loss in nats: forward_kl is KL(teacher || student), reverse_kl is KL(student || teacher), jsd is
            between them (see beta).
        on_policy_divergence: The same for the student's own answers; none repeats divergence.
        beta: Position of jsd between forward KL (0) and reverse KL (1); change the learning rate with it.
        loss_temperature: Divides the logits of both models inside the divergence.
        cross_entropy_weight: Weight of the cross-entropy on gold answers, added to the divergence (stage 1 only).
        on_policy_start: Optimizer steps of stage 1; negative leaves stage 2 out.
        on_policy_ramp: Optimizer steps over which the share of on-policy steps rises to on_policy_share after that.
        on_policy_share: Final share of steps on the student's own answers, 0 to 1.
        rollout_tokens: Length of the student's own answers in tokens, at most.
        sampling_temperature: Temperature at which the student samples them; independent of loss_temperature.
        rollout_seed: Seed of the draws and samples; the same on every rank.
        teacher_dtype: Teacher's weights: auto is bfloat16 in half-precision training and else float32; int8 keeps its decoder
            layers in 8 bits (one scale per output), which changes its answers a little.
        kwargs: Settings of StudentModule.

    Raises:
        ValueError: A setting is out of range, or (when the models are built) the tokenizers differ.
    """

    def __init__(
        self,
        teacher: str,
        divergence: Divergence = "forward_kl",
        on_policy_divergence: Divergence | None = None,
        beta: float = 0.5,
        loss_temperature: float = 1.0,
        cross_entropy_weight: float = 0.0,
        on_policy_start: int = -1,
        on_policy_ramp: int = 0,
        on_policy_share: float = 1.0,
        rollout_tokens: int = 64,
        sampling_temperature: float = 1.0,
        rollout_seed: int = 0,
        teacher_dtype: TeacherDtype = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_range("on_policy_share", on_policy_share, 0, 1)
        _check_range("beta", beta, 0, 1)
        _check_range("loss_temperature", loss_temperature, 1e-3, 1e3)
        _check_range("sampling_temperature", sampling_temperature, 1e-3, 1e3)
        _check_range("rollout_tokens", rollout_tokens, 1, 1_000_000)
        self.teacher_reference = teacher
        self.divergences = {"dataset": divergence, "on_policy": on_policy_divergence or divergence}
        self.beta = beta
        self.loss_temperature = loss_temperature
        self.cross_entropy_weight = cross_entropy_weight
        self.on_policy_start = on_policy_start
        self.on_policy_ramp = on_policy_ramp
        self.on_policy_share = on_policy_share
        self.rollout_tokens = rollout_tokens
        self.sampling_temperature = sampling_temperature
        self.rollout_seed = rollout_seed
        self.teacher_dtype: TeacherDtype = teacher_dtype
        self._sampler: tuple[int, Any] | None = None
        self._teacher_metrics: AnswerMetrics | None = AnswerMetrics()

    def configure_model(self) -> None:
        """Load student and teacher, and refuse a pair that does not share a tokenizer."""
        if hasattr(self, "student"):
            return
        super().configure_model()
        check_same_tokenizer(
            self.tokenizer, load_tokenizer(self.teacher_reference, trust_remote_code=self.trust_remote_code)
        )
        self.teacher = Teacher(
            self.teacher_reference,
            dtype=getattr(torch, self.teacher_dtype) if self.teacher_dtype in FLOATS else self.inference_dtype,
            int8=self.teacher_dtype == "int8",
            trust_remote_code=self.trust_remote_code,
        )
        if self.device_mesh is not None:
            if self.teacher_dtype == "int8" or self.generate_tokens:
                raise ValueError(
                    "expected a sharded teacher in floating point that generates nothing, found model.teacher_dtype "
                    f"{self.teacher_dtype} and model.generate_tokens {self.generate_tokens}; set them to auto and 0"
                )
            self.teacher.shard(self.device_mesh["data_parallel"])
        # Heads may be padded beyond the tokenizer, each to another size: only ids that both have take part.
        self.vocabulary = min(m.get_output_embeddings().weight.shape[0] for m in (self.student, self.teacher.model))

    def setup(self, stage: str) -> None:
        """Put the teacher where the student will be."""
        self.configure_model()
        self.teacher.to(self.trainer.strategy.root_device)

    # Training -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One divergence, on the data's answers or on the student's own."""
        source: Literal["dataset", "on_policy"] = "on_policy" if self.is_on_policy(self.global_step) else "dataset"
        if source == "on_policy":
            batch = self._answer_ourselves(batch, batch_idx)
        with self.stopwatch("teacher"):
            teacher_logits_NV = self.teacher_logits(batch)
        logits_NV = answer_logits(self.student, batch)[:, : self.vocabulary]
        loss = divergence(
            self.divergences[source],
            logits_NV,
            teacher_logits_NV,
            beta=self.beta,
            temperature=self.loss_temperature,
        ).mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log(f"train/{self.divergences[source]}_{source}", loss)
        if source == "dataset" and self.cross_entropy_weight:
            cross_entropy = F.cross_entropy(logits_NV.float(), answer_labels(batch))
            self.log("train/cross_entropy", cross_entropy)
            loss = loss + self.cross_entropy_weight * cross_entropy
        return self.finite(loss, batch)

    def on_policy_probability(self, step: int) -> float:
        """Probability that an optimizer step uses the student's own answers."""
        if self.on_policy_start < 0 or step < self.on_policy_start:
            return 0.0
        progress = (step - self.on_policy_start + 1) / max(self.on_policy_ramp, 1)
        return self.on_policy_share * min(progress, 1.0)

    def is_on_policy(self, step: int) -> bool:
        """The draw of an optimizer step: the same for all its micro-batches and on every rank."""
        draw = torch.rand((), generator=_generator("draw", self.rollout_seed, step))
        return bool(draw < self.on_policy_probability(step))

    def _answer_ourselves(self, batch: Batch, batch_idx: int) -> Batch:
        with self.stopwatch("rollout"), torch.autocast(self.device.type, enabled=False):
            sampler = self._sampler_of_step()
            answers = rollout(
                sampler,
                batch["prompt_ids"],
                batch["prompt_mask"],
                max_new_tokens=self.rollout_tokens,
                temperature=self.sampling_temperature,
                end_tokens=end_token_ids(sampler),
                generator=_generator(
                    "rollout", self.rollout_seed, self.global_step, batch_idx, self.global_rank, device=self.device
                ),
                vocabulary=self.vocabulary,
            )
        self.log("train/rollout_tokens", answers.mask_BG.sum(1).float().mean())
        return rollout_batch(batch, answers)

    def _sampler_of_step(self) -> Any:
        """The half-precision copy that samples, made once per optimizer step."""
        if self._sampler is None or self._sampler[0] != self.global_step:
            self._sampler = None  # free the old copy first
            self._sampler = (self.global_step, inference_copy(self.student, self.inference_dtype))
        return self._sampler[1]

    # Evaluation -----------------------------------------------------------------------------------------------------

    def teacher_logits(self, batch: Batch) -> Tensor:
        """Teacher's logits at the answer positions, over the common vocabulary."""
        return self.teacher.answer_logits(batch)[:, : self.vocabulary]

    def _evaluation_step(self, batch: Batch, split: str) -> None:
        super()._evaluation_step(batch, split)
        if self._teacher_metrics is not None:
            self._judge_teacher(self._teacher_metrics.to(self.device), batch, split)

    def _judge_teacher(self, metrics: AnswerMetrics, batch: Batch, split: str) -> None:
        metrics.update(self.teacher_logits(batch), answer_labels(batch), None)
        self._score(self.teacher.model, metrics, batch, split)

    def _end_evaluation(self, split: str) -> None:
        super()._end_evaluation(split)
        if self._teacher_metrics is not None and not self.trainer.sanity_checking:
            figures = {f"{split}/teacher_{name}": value for name, value in self._teacher_metrics.compute().items()}
            self.log_dict(figures)
            rank_zero_info("The teacher's own figures: %s", ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
            self._teacher_metrics = None  # once is enough: the teacher never changes
        elif self._teacher_metrics is not None:
            self._teacher_metrics.reset()


def _generator(*key: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by its key alone."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(
            f"expected model.{name} between {low:g} and {high:g}, found {value:g}; change it in the recipe"
        )
