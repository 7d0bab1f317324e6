"""`StudentModule`: builds the student, edits it, optimizes it, and keeps its structure in the checkpoint."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import get_scheduler

from datamodules.collate import Batch, OptimizerStep
from models.architecture import check_family
from models.evaluation.module import EvaluatedModule
from models.forward import checkpoint_activations
from models.generation.sampling import seed_of
from models.hardware.attention import use_attention
from models.hardware.freed_memory import keep_freed_memory
from models.hardware.low_precision import check_rounding
from models.hardware.sharding import check_shardable, shard
from models.loading.reference import check_same_tokenizer, load_model, load_tokenizer
from models.losses import check_head, head_of
from models.quantization.learned_scales import add_scale_group, cover_new_groups, learned_scales, round_learned_scales
from models.quantization.output_head import untie_head
from models.step_mean import StepMean, step_of
from models.stopwatch import Stopwatch
from models.structure.edits import Edit, apply_edit, replay
from models.teacher import Teacher, TeacherDtype
from program.ranges import Between, Count, check_arguments, check_range

Settings = TypeVar("Settings")


class StudentModule(EvaluatedModule):
    """Base of all training modules: a Hugging Face student whose structure is an ordered list of edits.

    Args:
        student: Model to train: a Hugging Face folder, a hub id, a .gguf file, or package:smollm2-135m-instruct.
        optimizer: Optimizer class and its settings, for example torch.optim.AdamW with lr (per step).
        lr_schedule: Course of the learning rate over trainer.max_steps, after the warm-up.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        generate_tokens: Length in tokens of the answers that validation generates for the task score; 0 for none.
        gradient_checkpointing: Keep each decoder layer's input only and compute the layer again in the backward pass: less
            memory, about a third more time, the same gradients.
        student_dtype: Weights' floating point type while training; bfloat16 needs an optimizer that rounds stochastically,
            for example torchao.optim.AdamW8bit with bf16_stochastic_round (see configs/bf16_weights.yaml).
        chunk_tokens: Answer tokens whose logits the loss holds at once, at most; more is faster and takes more memory. 0 chooses
            by the size of the vocabulary.
        trust_remote_code: Run Python code that comes with the models.

    Raises:
        FileNotFoundError: (when the model is built) there is no model at the reference.
        ValueError: A number is out of its range; (when the model is built) its family is unknown.
    """

    def __init__(
        self,
        student: str,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: Literal["linear", "cosine", "constant"] = "linear",
        warmup_steps: Count = 0,
        generate_tokens: Annotated[int, Between(0, 1e6)] = 64,
        gradient_checkpointing: bool = False,
        student_dtype: Literal["float32", "bfloat16"] = "float32",
        chunk_tokens: Annotated[int, Between(0, 1e9, advice="0 lets the loss choose")] = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(StudentModule.__init__, locals(), "model.")
        self.save_hyperparameters(logger=False)
        # A checkpoint holds primitives only: what the CLI records is plain data; a class, a partial or settings are not.
        self.remove_ignored_hparams([name for name, value in self.hparams.items() if callable(value)])
        settings = {name: value for name, value in self.hparams.items() if is_dataclass(value)}
        self.hparams.update({name: asdict(value) for name, value in settings.items()})  # type: ignore[arg-type]
        self.student_reference = student
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.generate_tokens = generate_tokens
        self.gradient_checkpointing = gradient_checkpointing
        self.student_dtype = student_dtype
        self.chunk_tokens = chunk_tokens
        self.trust_remote_code = trust_remote_code
        self.edits: list[Edit] = []
        self.stopwatch = Stopwatch()
        self.step_mean = StepMean(self)
        self._losses: list[
            tuple[Tensor, int, list[int], str]
        ] = []  # not looked at yet, with step, samples and first prompt

    # Building -------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the student and its tokenizer, once."""
        if hasattr(self, "student"):
            return
        self.tokenizer = load_tokenizer(self.student_reference, trust_remote_code=self.trust_remote_code)
        dtype = getattr(torch, self.student_dtype)
        student = load_model(self.student_reference, dtype=dtype, trust_remote_code=self.trust_remote_code)
        check_family(student.config)
        check_head(student, head_of(student))
        use_attention(student)
        self.vocabulary = len(head_of(student).weight_VD)
        if self.device_mesh is not None:
            check_shardable(self.trainer.callbacks)  # type: ignore[attr-defined]
            shard(student, self.device_mesh["data_parallel"])
        if self.gradient_checkpointing:
            checkpoint_activations(student)
        self.student = student.train()  # from_pretrained leaves it in evaluation mode, and so would Lightning

    def load_teacher(self, reference: str, dtype: TeacherDtype, *, generate_tokens: int = 0) -> Teacher:
        """A teacher that the student can learn from, sharded as the student is.

        Of its weights' types auto is `inference_dtype`, and int8 keeps the decoder layers in 8 bits.  `generate_tokens` is the length of
        the answers that it will be asked for.

        Raises:
            ValueError: The tokenizers differ, the losses cannot compute with the teacher's head, or it cannot be sharded.
        """
        trusted = self.trust_remote_code
        check_same_tokenizer(self.tokenizer, load_tokenizer(reference, trust_remote_code=trusted))
        numbers = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, self.inference_dtype)
        teacher = Teacher(reference, dtype=numbers, int8=dtype == "int8", trust_remote_code=trusted)
        check_head(teacher.model, head_of(teacher.model))
        if self.device_mesh is not None:
            if dtype == "int8" or generate_tokens:
                raise ValueError(
                    "expected a sharded teacher in floating point that generates nothing, found model.teacher_dtype "
                    f"{dtype} and model.generate_tokens {generate_tokens}; set them to auto and 0"
                )
            shard(teacher.model, self.device_mesh["data_parallel"])
        return teacher

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the student's trainable parameters, with a schedule over `trainer.max_steps`.

        Raises:
            ValueError: The precision is float16; the schedule or the warm-up does not fit the run; the optimizer would lose updates.
        """
        if str(self.trainer.precision).startswith("16"):
            raise ValueError(
                f"expected trainer.precision bf16-mixed or 32-true, found {self.trainer.precision}: gradients of single logits are too small "
                "for float16; set trainer.precision to bf16-mixed"
            )
        scales = learned_scales(self.student)
        apart = {id(scale) for scale in scales}
        optimizer = self.optimizer([p for p in self.student.parameters() if p.requires_grad and id(p) not in apart])
        if scales:  # of a resumed student
            add_scale_group(optimizer, scales)
        check_rounding(optimizer)
        steps = self.trainer.max_steps
        if self.lr_schedule != "constant" and steps <= 0:
            raise ValueError(
                f"expected trainer.max_steps for the {self.lr_schedule} learning rate schedule, found {steps}; "
                "set trainer.max_steps, or model.lr_schedule to constant"
            )
        if steps > 0:
            within = Between(0, steps, advice="the warm-up ends before the run")
            check_range("model.warmup_steps", self.warmup_steps, within)
        name = "constant_with_warmup" if self.lr_schedule == "constant" else self.lr_schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=max(steps, 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Move the parameters, and round learned scales to numbers to compute with."""
        super().optimizer_step(*args, **kwargs)
        round_learned_scales(self.student)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm directly: Lightning refuses that for fused optimizers."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), gradient_clip_val)

    # Structure ------------------------------------------------------------------------------------------------------

    def edit(self, edits: Sequence[Edit]) -> None:
        """Apply edits to the student and to the optimizer's state, and record them.

        Only between optimizer steps: gradients are dropped.
        """
        optimizers = self.optimizers(use_pl_optimizer=False) if self._trainer is not None else []
        for edit in edits:
            apply_edit(self.student, edit, optimizers if isinstance(optimizers, list) else [optimizers])
            self.edits.append(edit)
        for config in self.trainer.lr_scheduler_configs if self._trainer is not None else ():
            cover_new_groups(config.scheduler)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the structure beside the weights, which no loss has spoilt."""
        self.check_losses()
        checkpoint["edits"] = self.edits

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the structure before the weights load."""
        self.configure_model()
        edits: list[Edit] = checkpoint["edits"]
        known = len(self.edits)
        if self.edits != edits[:known]:
            raise ValueError(
                f"expected a checkpoint that continues this student's {known} edits, found one with another history of "
                f"{len(edits)}; load it into a new module"
            )
        for edit in edits[known:]:
            try:
                replay(self.student, [edit])
            except (TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
                raise ValueError(
                    f"expected edits that fit this student, found {repr(edit)[:100]}, which does not ({error}); resume with the model that the "
                    "checkpoint was made from"
                ) from error
        self.edits = list(edits)
        if "state_dict" in checkpoint:  # a sharding strategy has loaded the weights before, and removed them here
            _check_weights(self, checkpoint)
            _follow_head(self, checkpoint["state_dict"])

    # Steps ----------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Settle how this process handles memory."""
        if self.device.type == "cpu":
            keep_freed_memory()

    def on_train_end(self) -> None:
        """No loss is left unseen."""
        self.check_losses()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Drop old gradients, and seed dropout by the step, so that a resumed run needs no saved random state.

        Lightning would keep the gradients of one step until the forward pass of the next is over: memory that is better spent
        on the next rollout.
        """
        if self.step_of(batch).begins:
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()
        seed = os.environ.get("PL_GLOBAL_SEED", "0")  # of seed_everything
        torch.manual_seed(seed_of("dropout", seed, self.global_step, batch_idx, self.global_rank))

    def step_of(self, batch: Batch) -> OptimizerStep:
        """The optimizer step that a micro-batch of training belongs to."""
        return step_of(batch, self.trainer.accumulate_grad_batches)

    def share_of_step(self, total: Tensor, batch: Batch) -> Tensor:
        """What `training_step` returns for a loss summed over answer tokens: its share of the optimizer step's mean."""
        self.step_mean.add("train/loss", total)
        if self.step_of(batch).ends:
            figures = self.step_mean.means()
            self.log("train/loss", figures.pop("train/loss"), prog_bar=True, sync_dist=self.trainer.world_size > 1)
            self.log_dict(figures, sync_dist=self.trainer.world_size > 1)
        return self.finite(self.step_mean.loss(total), batch)

    def finite(self, loss: Tensor, batch: Batch) -> Tensor:
        """The loss, which must be finite: on a CPU its step is not taken otherwise; on a GPU, which is not waited for in every step, it
        is found out with the next entry of the log, and in any case before a checkpoint is written.
        """
        self.stopwatch.tokens = self.stopwatch.tokens + batch["attention_mask"].sum()
        self._losses.append((loss.detach(), self.global_step, batch["index"], batch["prompts"][0][:80]))
        if self.device.type == "cpu" or self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.check_losses()
        return loss

    def check_losses(self) -> None:
        """Look at the losses since the last look.

        Raises:
            ValueError: One was not finite; names the step and its samples.
        """
        losses, self._losses = self._losses, []
        values = torch.stack([loss for loss, *_ in losses]).tolist() if losses else []
        for value, (_, step, samples, prompt) in zip(values, losses, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"expected a finite loss at step {step}, found {value} on the samples {samples} ({prompt!r}, ...); lower the "
                    "learning rate or look at these samples, then resume from the last checkpoint with --ckpt_path"
                )


def settings_of(kind: type[Settings], given: Settings | dict[str, Any]) -> Settings:
    """Settings as an object: a checkpoint, which holds plain data only, gives them back as a dict."""
    return kind(**given) if isinstance(given, dict) else given


def _check_weights(module: "StudentModule", checkpoint: dict[str, Any]) -> None:
    """Raise `ValueError` for the weights of another student, which torch would answer with a list of tensors."""
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"expected a checkpoint of the student {module.student_reference!r}, found {name} of shape "
                f"{theirs.get(name)} instead of {ours.get(name)}; it was trained from "
                f"{checkpoint.get('hyper_parameters', {}).get('student')!r}: set model.init_args.student to that"
            )


def _follow_head(module: "StudentModule", weights: dict[str, Tensor]) -> None:
    """Give the head a weight of its own where a checkpoint has one: models from GGUF files are tied at load, and were not before."""
    head, embedding = module.student.get_output_embeddings(), module.student.get_input_embeddings()
    names = {id(owner): f"student.{name}.weight" for name, owner in module.student.named_modules()}
    if not torch.equal(weights[names[id(head)]], weights[names[id(embedding)]]):
        untie_head(module.student)
