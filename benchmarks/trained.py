"""Shared by the studies that train: recipe, data and precision (`study.yaml`), one judge, and rows that survive.

All runs of a study start from the same student, see the same batches in the same order for a seed, and are judged on the same
held-out questions; a seed decides the order of the training questions and what the student samples.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.harness import parser
from benchmarks.judge import Judge, TrainingClock
from benchmarks.study import Row, Rows, fingerprint
from datamodules import ReasoningTasks
from models import StudentModule
from program.screen import WARNINGS

RECIPE = Path(__file__).parent / "distillation/study.yaml"
PACKAGES = ("torch", "lightning", "transformers", "reasoning-gym")


class TrainingStudy:
    """Everything that the runs share."""

    def __init__(self, options: argparse.Namespace, student: str) -> None:
        self.options, self.student = options, student
        recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
        model, trainer = recipe["model"]["init_args"], recipe["trainer"]
        self.precision, self.clip = trainer["precision"], trainer["gradient_clip_val"]
        self.optimizer = model["optimizer"]["init_args"] | ({"lr": options.lr} if options.lr else {})
        self.warmup_share = model["warmup_steps"] / trainer["max_steps"]
        self.tokens = model["on_policy"]["tokens"]
        data = recipe["data"]["init_args"] | {"test_size": options.test_size}
        settings = {
            "teacher": fingerprint(Path(options.teacher)),
            "data": data,
            "optimizer": self.optimizer,
            "warmup_share": self.warmup_share,
            "precision": self.precision,
            "gradient_clip_val": self.clip,
            "tokens": self.tokens,
        }
        self.rows = Rows(options.out, PACKAGES, settings)
        self.data = ReasoningTasks(self.student, **data)
        self.data.setup("fit")  # now, with the recipe's seed: all runs get the same questions, only their order differs
        self.data.setup("test")
        self.judge = Judge(options.teacher, self.data, tokens=self.tokens, precision=self.precision)

    def reference(self, name: str, model: Callable[[], PreTrainedModel]) -> Row:
        """The figures of a model that is not trained here: the teacher, the student as it starts."""

        def make() -> Row:
            student = model()
            return {"name": name, **self.judge.on_validation(student), **self.judge.on_test(student)}

        return self.rows.find_or_make(name, {}, make)

    def of_student(self, steps: int) -> dict[str, Any]:
        """Arguments of the student's module that all runs share."""
        return {
            "student": self.student,
            "optimizer": partial(torch.optim.AdamW, **self.optimizer),
            "warmup_steps": round(self.warmup_share * steps),
            "generate_tokens": 0,
        }

    def fit(self, make: Callable[[], StudentModule], seed: int, steps: int, callbacks: Sequence[Callback] = ()) -> Row:
        """Train what `make` gives, with this seed for it, too; its figures at some points and at the end, and seconds."""
        lightning.seed_everything(seed, verbose=False)
        self.data.seed = seed  # of the order; the questions were drawn before
        clock, module = TrainingClock(self.judge.on_validation, points=4), make()
        settings = {"precision": self.precision, "gradient_clip_val": self.clip}
        train(module, self.data, steps, [*callbacks, clock], **settings)
        took = {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}
        return {**took, **self.judge.on_test(module.student), "curve": clock.curve}


def quiet() -> None:
    """Say only what a study says."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    disable_progress_bar()  # of loading models, between ours
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def quiet_trainer(steps: int, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    """A trainer that neither judges nor writes nor says anything by itself."""
    usual = {
        "accelerator": "gpu" if torch.cuda.is_available() else "cpu",
        "devices": 1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(max_steps=steps, callbacks=list(callbacks), **usual | settings)


def train(
    module: LightningModule, data: Any, steps: int, callbacks: Sequence[Callback] = (), **settings: Any
) -> Trainer:
    """Train for so many steps, under a bar; `data` is a data module or a loader."""
    with tqdm(total=steps, desc="Training", unit="step", leave=False) as bar:
        counting = LambdaCallback(on_train_batch_end=lambda *_: bar.update())
        trainer = quiet_trainer(steps, [*callbacks, counting], **settings)
        trainer.fit(module, data)
    if trainer.global_step != steps:  # a signal ends a fit without an error
        raise RuntimeError(f"expected {steps} steps, found an end after {trainer.global_step}; repeat the command")
    return trainer


def training_parser(
    description: str | None, out: str, arms: Collection[str], *, steps: int, test_size: int
) -> argparse.ArgumentParser:
    """The options of every study that trains: its arms, and with what defaults."""
    options = parser(description, repetitions=None, out=out)
    add = options.add_argument
    add("--steps", type=int, default=steps, help="optimizer steps of every arm (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run of each arm for each seed")
    add("--arms", nargs="+", choices=arms, default=list(arms), metavar="ARM", help=f"{', '.join(arms)} (default: all)")
    add("--test-size", type=int, default=test_size, help="held-out questions, about (default: %(default)s)")
    return options


def recipe_options(options: argparse.ArgumentParser) -> None:
    """Those of `TrainingStudy`."""
    options.add_argument("--teacher", default="runs/study/teacher/student", help="Hugging Face folder")
    options.add_argument("--lr", type=float, help="highest learning rate of all arms (default: the recipe's)")
    options.add_argument("--recipe", type=Path, default=RECIPE, help="whose data, optimizer and precision to use")


def parse(options: argparse.ArgumentParser, arguments: Sequence[str] | None, least: int = 2) -> argparse.Namespace:
    """The command line; ends with a message unless steps and seeds make sense."""
    found = options.parse_args(arguments)
    if found.steps < least or len(set(found.seeds)) < len(found.seeds):
        options.error(f"expected {least} steps or more and different seeds, found {found.steps} and {found.seeds}")
    return found
