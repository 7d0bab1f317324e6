"""Runs that `test_step_mean.py` compares; as a script, the ones on two ranks: `python -m tests.helpers.step_mean_runs PLACE`.

16 samples make one epoch, and one optimizer step is an epoch, however it is cut.
"""

import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from datamodules import Conversations
from models import SFT, Distillation
from models.generation.on_policy import OnPolicy
from models.losses import Objective

MIX = Objective({"forward_kl": 1.0, "reverse_kl": 0.5, "cross_entropy": 0.1})
LAYERS = {"hidden_state_weight": 0.3, "hidden_state_layers": {0: 0}}
KINDS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dataset": {"objective": MIX, **LAYERS},
    "on policy": {"objective": MIX, **LAYERS, "on_policy": OnPolicy(start=0, tokens=12)},
}
CUTS = {"1 x 16": (1, 16, 1), "4 x 4": (1, 4, 4), "2 ranks x 2 x 4": (2, 4, 2)}  # ranks, batch size, accumulation


class Lengths(Callback):
    """Answer tokens and losses as this rank's micro-batches have them."""

    def __init__(self) -> None:
        self.answer_tokens: list[int] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.answer_tokens.append(int((batch["labels"][:, 1:] != -100).sum()))
        self.losses.append(float(outputs["loss"]))


def weights_of(module: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.student.parameters()])


def fit(place: Path, kind: str, cut: str, steps: int = 1, lr: float = 10.0) -> dict[str, Any]:
    """What plain SGD changes in so many steps, and what is logged."""
    ranks, batch_size, accumulate = CUTS[cut]
    sgd = partial(torch.optim.SGD, lr=lr)
    settings = {"student": str(place / "student"), "optimizer": sgd, "lr_schedule": "constant", "generate_tokens": 0}
    module: Any
    module = SFT(**settings) if kind == "sft" else Distillation(str(place / "teacher"), **KINDS[kind], **settings)
    data = Conversations(
        tokenizer=str(place / "student"),
        train=str(place / "data.jsonl"),
        batch_size=batch_size,
        val_fraction=0,
        length_bucketing=False,
    )
    module.configure_model()
    before, lengths = weights_of(module).clone(), Lengths()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(timeout=timedelta(seconds=60)) if ranks > 1 else "auto",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        default_root_dir=place,
        callbacks=[lengths],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    return {
        "update": weights_of(module) - before,
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "answer_tokens": lengths.answer_tokens,
        "losses": lengths.losses,
    }


def main() -> None:
    """All kinds on two ranks."""
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    runs = {kind: fit(place, kind, "2 ranks x 2 x 4") for kind in KINDS}
    torch.save(runs, place / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
