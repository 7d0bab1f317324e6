"""What distillation gives back of what quantization took: quantization-aware training from the calibrated student on.

The student starts as the best that calibration alone makes (the arm of `benchmarks/quantization_arms.py`), learns from the unquantized
model with fake quantizers in place (QAT with distillation), on the model's own answers to instructions that calibration has not seen, and
is judged on the same held-out answers before and after.
"""

from functools import partial
from typing import Any

import lightning
import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from benchmarks.chats import answered, calibration_prompts
from benchmarks.quantization_arms import Arm
from benchmarks.study import Row
from benchmarks.study_training import quiet
from models.distillation import Distillation
from models.evaluation import evaluate

TRAINING_SAMPLES = 256
BATCH_SIZE = 8
STEPS = 64
LEARNING_RATES = {"fp8_e4m3": 1e-5}
_LEARNING_RATE = 3e-5


def training_rows(bench: Any, arm: Arm, *, steps: int, seed: int = 0) -> list[Row]:
    """The student before and after training, both judged.

    Args:
        bench: A `benchmarks.quantization.Bench`.
        arm: How it is calibrated.
        steps: Optimizer steps of eight conversations.
        seed: Of the order of the conversations.
    """
    quiet()
    lightning.seed_everything(seed, verbose=False)
    module = Distillation(
        teacher=bench.reference,
        student=bench.reference,
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATES.get(arm.format, _LEARNING_RATE), weight_decay=0.0),
        warmup_steps=steps // 8,
        generate_tokens=0,
    )
    module.configure_model()
    arm.quantize(module.student, bench.calibration)
    before = _judged(bench, arm, module.student, "calibrated")
    batches = _batches(bench)
    order = [
        batches[index] for epoch in range(-(-steps // len(batches))) for index in _shuffled(len(batches), seed + epoch)
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(order, batch_size=None))  # type: ignore[arg-type]  # a list is a data set
    return [before, _judged(bench, arm, module.student, f"after {steps} steps")]


def _batches(bench: Any) -> list[Any]:
    """Answers of the unquantized model to instructions behind those of calibration."""
    used = sum(len(batch["input_ids"]) for batch in bench.calibration)
    prompts = calibration_prompts(used + TRAINING_SAMPLES)[used:]
    return answered(bench.model, bench.tokenizer, bench.reference, prompts, batch_size=BATCH_SIZE)


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _judged(bench: Any, arm: Arm, student: PreTrainedModel, name: str) -> Row:
    figures = evaluate(student, bench.held_out, tokenizer=bench.tokenizer, teacher=bench.teacher, dtype=torch.float32)
    return {"format": arm.format, "arm": f"{arm.name}, {name}", **figures}
