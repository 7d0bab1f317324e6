"""Runs that `test_ranking_distillation.py` compares; as a script, the ones on two ranks: `python -m tests.helpers.ranking_runs PLACE`.

16 samples make one epoch and one optimizer step, however it is cut; there are 7 samples to judge, which two ranks cannot share evenly.
"""

import json
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy

from datamodules import Ranking
from models.losses.labels import LabelObjective
from models.ranking_distillation import RankingDistillation

LABELS = ("n", "y", "?")
MIX = LabelObjective(0.5, label_kl=1.0, full_kl=0.3, temperature=1.5)
CUTS = {"1 x 16": (1, 16, 1), "4 x 4": (1, 4, 4), "2 ranks x 2 x 4": (2, 4, 2)}  # ranks, batch size, accumulation


def row(number: int) -> dict[str, Any]:
    """Three users, all labels, prompts of many lengths, and a graded label now and then."""
    label = {"labels": {"n": 1, "?": 2}} if number % 5 == 4 else {"label": LABELS[number % 3]}
    return {"prompt": f"Film {number:02} {'ab' * (number * number % 13)}?", "user": number * 7 % 10 % 3, **label}


def write_rows(path: Path, numbers: range) -> str:
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in numbers))
    return str(path)


def rows_of(place: Path, **settings: Any) -> Ranking:
    """The data that `place` holds."""
    held_out = {name: str(place / "judged.jsonl") for name in ("val", "test")}
    defaults: dict[str, Any] = {"labels": LABELS, "batch_size": 4, "eval_batch_size": 2, "length_bucketing": False}
    return Ranking(str(place / "student"), str(place / "rows.jsonl"), **{**defaults, **held_out, **settings})


def rank(place: Path, **settings: Any) -> RankingDistillation:
    """A student of the tiny teacher; without settings, of plain SGD and the mix of all losses."""
    sgd = partial(torch.optim.SGD, lr=10.0)
    defaults: dict[str, Any] = {"student": str(place / "student"), "teacher": str(place / "teacher"), "objective": MIX}
    return RankingDistillation(**{**defaults, "optimizer": sgd, "lr_schedule": "constant", "resamples": 20, **settings})


def weights_of(module: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.student.parameters()])


def fit(place: Path, cut: str) -> dict[str, Any]:
    """What one step changes, what is logged, and the figures of the student after it."""
    ranks, batch_size, accumulate = CUTS[cut]
    module = rank(place)
    module.configure_model()
    before = weights_of(module).clone()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(timeout=timedelta(seconds=60)) if ranks > 1 else "auto",
        max_steps=1,
        accumulate_grad_batches=accumulate,
        default_root_dir=place,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    data = rows_of(place, batch_size=batch_size)
    trainer.fit(module, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    update = weights_of(module) - before
    (tested,) = trainer.test(module, data, verbose=False)
    return {"update": update, "logged": logged, "tested": tested}


def main() -> None:
    """The run on two ranks."""
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    torch.save(fit(place, "2 ranks x 2 x 4"), place / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
