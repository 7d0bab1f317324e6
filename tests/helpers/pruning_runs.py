"""Short runs with pruning, and a checkpoint of every moment at which a crash could come."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from callbacks import GradualPruning
from datamodules import Conversations
from models import Distillation
from tests.helpers.tiny import tiny_folder, tiny_jsonl

STEPS = 7


def make_places(folder: Path) -> dict[str, str]:
    """A student of four layers, its teacher, and conversations."""
    return {
        "student": tiny_folder(folder / "student", seed=1, num_hidden_layers=4),
        "teacher": tiny_folder(folder / "teacher", seed=2, num_hidden_layers=4),
        "data": tiny_jsonl(folder / "data.jsonl", [(f"{n} plus {n}?", f"It is {2 * n}") for n in range(40)]),
    }


class Save(Callback):
    """A checkpoint after every optimizer step: before the callbacks listed behind this one, after those in front."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"{self.name}-{trainer.global_step}.ckpt")


def pruning(*sparsities: float, **settings: Any) -> GradualPruning:
    """Two events, after steps 2 and 4."""
    defaults: dict[str, Any] = {"start_step": 2, "end_step": 4, "events": 2, "schedule": "linear", "multiple": 8}
    return GradualPruning(*sparsities, **defaults | {"calibration_batches": 2, "judge_batches": 2} | settings)


def fit(places: dict[str, str], folder: Path, *callbacks: Callback, resume: str = "", **settings: Any) -> Trainer:
    """A run with these callbacks; settings of the module, and of the trainer with the prefix `trainer_`."""
    prefix = "trainer_"
    of_trainer = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
    module = Distillation(
        student=places["student"],
        teacher=places["teacher"],
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        warmup_steps=2,
        generate_tokens=0,
        **{name: value for name, value in settings.items() if not name.startswith(prefix)},
    )
    data = Conversations(tokenizer=places["student"], train=places["data"], batch_size=3, val_fraction=0.2, seed=3)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "logger": False,
        "gradient_clip_val": 1.0,
        "limit_val_batches": 0,
    }
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **defaults | of_trainer,
    )
    trainer.fit(module, data, ckpt_path=str(folder / resume) if resume else None)
    return trainer
