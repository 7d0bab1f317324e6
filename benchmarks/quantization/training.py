"""Quantization-aware training of calibrated students, for the quantization study.

| way                           | answers                | learns from             |
|-------------------------------|------------------------|-------------------------|
| QAT                           | the unquantized model's | the tokens of the answers |
| QAT, distillation             | the same               | the unquantized model's probabilities |
| QAT, distillation, learned scales | the same           | the same; scales are trained as well (LSQ) |
| calibrated on all, QAT, distillation, learned scales | the unquantized model's | the same |
| QAT, on-policy distillation   | the quantized student's own | the same           |

The student starts as the best that calibration alone makes (`benchmarks/quantization/arms.py`).  Questions are instructions that calibration
has not seen; all ways see them in the same order.  Where it is calibrated on all, it starts from a calibration that has seen the
conversations of training too, as that of `QuantizationAwareTraining` does with as many `calibration_batches`.
"""

import time
from functools import partial
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from benchmarks.chats import SAMPLING, answered, calibration_prompts
from benchmarks.quantization.arms import Arm
from benchmarks.study import Row
from benchmarks.trained import train
from models.distillation import Distillation
from models.generation.on_policy import OnPolicy
from models.losses import Objective
from models.post_training.format_choice import bits_of
from models.quantization.learned_scales import learn_scales

DISTILLED = "QAT, distillation"
LEARNED = "QAT, distillation, learned scales"
ON_ALL = "calibrated on all, QAT, distillation, learned scales"
TRAINING_SAMPLES = 160
BATCH_SIZE = 8
STEPS = 64
OWN_TOKENS = 128  # of the student's own answers, at most
WAYS: dict[str, dict[str, Any]] = {
    "QAT": {"objective": Objective({"cross_entropy": 1.0})},
    DISTILLED: {},
    LEARNED: {},
    ON_ALL: {},
    "QAT, on-policy distillation": {"on_policy": OnPolicy(start=0, tokens=OWN_TOKENS), "sampling": SAMPLING},
}
_LEARNING_RATES = {"fp8_e4m3": 5e-5}  # its steps are finer
_LEARNING_RATE = 2e-4


def learning_rate(format: str) -> float:
    """The highest of a run."""
    return _LEARNING_RATES.get(format, _LEARNING_RATE)


def trained_row(bench: Any, arm: Arm, way: str, steps: int, seed: int = 0) -> Row:
    """A student after training for so many steps of eight conversations; the seed is that of their order, and of sampling."""
    lightning.seed_everything(seed, verbose=False)
    module = Distillation(
        teacher=bench.reference,
        student=bench.reference,
        optimizer=partial(torch.optim.AdamW, lr=learning_rate(arm.format), weight_decay=0.0),
        warmup_steps=steps // 8,
        generate_tokens=0,
        **WAYS[way],
    )
    module.configure_model()
    batches = _batches(bench, steps, seed)
    # The calibration of a start serves several ways, and is not in their seconds.
    student = None if way == ON_ALL else bench.start(arm)
    started = time.perf_counter()
    if student is None:
        student = bench.quantized(arm, list({id(batch): batch for batch in batches}.values()))
    module.student = student.requires_grad_(True).train()
    if way in (LEARNED, ON_ALL):
        learn_scales(module.student, weights_follow=True)
    loader: DataLoader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a data set
    train(module, loader, steps, accelerator="cpu", precision="bf16-mixed", gradient_clip_val=1.0)
    made = {"way": way, "steps": steps, "seconds": time.perf_counter() - started, "bits": bits_of(arm.format)}
    return {"format": arm.format, "arm": f"{arm.name}, {way}, {steps} steps", **made, **bench.judge(module.student)}


def _batches(bench: Any, steps: int, seed: int) -> list[Any]:
    """Answers of the unquantized model to instructions behind those of calibration, reshuffled in every epoch."""
    used = sum(len(batch["input_ids"]) for batch in bench.calibration)
    prompts = calibration_prompts(used + TRAINING_SAMPLES)[used:]
    batches = answered(bench.model, bench.tokenizer, bench.reference, prompts, batch_size=BATCH_SIZE)
    order: list[Any] = []
    for epoch in range(-(-steps // len(batches))):
        generator = torch.Generator().manual_seed(seed + epoch)
        order += [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
    return order[:steps]
