"""Which distillation? Fine-tuning, stage 1, on-policy and two-stage, at equal optimizer steps and at equal time, over seeds.

    python -m benchmarks.study_distillation [--teacher FOLDER] [--steps N] [--seeds 1 2 3] [--arms ...] [--out FOLDER] [--json FILE]

The student has every second layer of the teacher; data, optimizer and precision are the quickstart's.  All arms start from the same
student, see the same batches in the same order for a seed, and are judged on the same held-out questions; a seed decides the
order of the training questions and what the student samples.

Equal time: how many steps each arm gets follows from the first seed's seconds per step, so that an arm trains about as long as
two_stage does at equal steps and its learning rate still ends at 0 with the run.  The result is a page beside the folder --out.
An interrupted command goes on where it stopped.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning import Trainer
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.harness import report
from benchmarks.study import Row, Rows, fingerprint, machine, write_half
from benchmarks.study_judge import Judge, TrainingClock
from benchmarks.study_page import write_page
from datamodules import ReasoningTasks
from models import SFT, Distillation, StudentModule
from models.losses import Objective
from models.on_policy import OnPolicy
from models.pretrained import load_model
from train import QUIET

RECIPE = Path(__file__).parent.parent / "configs/quickstart.yaml"
PACKAGES = ("torch", "lightning", "transformers", "reasoning-gym")
TIME_REFERENCE = "two_stage"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        title: For people.
        stage_1: Share of the steps on the data's answers before the student answers for itself; None for no teacher at all.
        stage_2: Divergence on the student's own answers.
    """

    title: str
    stage_1: float | None
    stage_2: Objective = Objective()  # noqa: RUF009  (frozen)


ARMS = {
    "sft": Arm("fine-tuning on gold answers, no teacher", None),
    "stage1": Arm("stage 1 only: forward KL on gold answers", 1.0),
    "on_policy": Arm("on-policy only: forward KL", 0.0),
    "two_stage": Arm("two-stage: forward KL, then forward KL on-policy", 0.5),
    "two_stage_reverse_kl": Arm("two-stage: ..., then reverse KL", 0.5, Objective({"reverse_kl": 1.0})),
    "two_stage_jsd": Arm("two-stage: ..., then JSD(0.5)", 0.5, Objective({"jsd": 1.0}, beta=0.5, join_ends=True)),
}


class Study:
    """Everything that the runs share.

    Args:
        options: The command line.
        student: Where the student was written.
    """

    def __init__(self, options: argparse.Namespace, student: Path) -> None:
        self.options, self.student = options, str(student)
        recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
        model, trainer = recipe["model"]["init_args"], recipe["trainer"]
        self.precision, self.clip = trainer["precision"], trainer["gradient_clip_val"]
        self.optimizer = model["optimizer"]["init_args"] | ({"lr": options.lr} if options.lr else {})
        self.warmup_share = model["warmup_steps"] / trainer["max_steps"]
        self.tokens = model["on_policy"]["tokens"]
        data = recipe["data"]["init_args"] | {"test_size": options.test_size}
        self.settings = {
            "teacher": fingerprint(Path(options.teacher)),
            "data": data,
            "optimizer": self.optimizer,
            "warmup_share": self.warmup_share,
            "precision": self.precision,
            "gradient_clip_val": self.clip,
            "tokens": self.tokens,
        }
        self.rows = Rows(options.out / "rows")
        self.data = ReasoningTasks(self.student, **data)
        self.data.setup(
            "fit"
        )  # now, with the recipe's seed: the questions are the same for all runs, only their order is not
        self.data.setup("test")
        self.judge = Judge(options.teacher, self.data, tokens=self.tokens, precision=self.precision)

    def reference(self, name: str, model: Any) -> Row:
        """The figures of a model that is not trained here: the teacher, the student as it starts."""
        row = self.rows.find(name, self.settings)
        if row is None:
            figures = self.judge.on_validation(model()) | self.judge.on_test(model())
            row = {"name": name, **figures, "settings": self.settings, "machine": machine(PACKAGES)}
            self.rows.write(name, row)
        return row

    def run(self, budget: str, arm: str, seed: int, steps: int) -> Row:
        """The row of one run, from disk if it has finished before."""
        name = f"{budget}-{arm}-{seed}"
        settings = {**self.settings, "steps": steps}
        row = self.rows.find(name, settings)
        if row is None:
            row = {"name": arm, "budget": budget, "seed": seed, "steps": steps, **self._train(ARMS[arm], seed, steps)}
            row |= {"settings": settings, "machine": machine(PACKAGES)}
            self.rows.write(name, row)
        return row

    def _train(self, arm: Arm, seed: int, steps: int) -> Row:
        lightning.seed_everything(seed, verbose=False)
        self.data.seed = seed  # of the order; the questions were drawn before
        clock = TrainingClock(self.judge.on_validation, points=4)
        module = self._module(arm, seed, steps)
        trainer = Trainer(
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=1,
            max_steps=steps,
            precision=self.precision,
            gradient_clip_val=self.clip,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=self.data)
        if trainer.global_step != steps:  # a signal ends a fit without an error
            raise RuntimeError(f"expected {steps} steps, found an end after {trainer.global_step}; repeat the command")
        return {**clock.figures(), **self.judge.on_test(module.student), "curve": clock.curve}

    def _module(self, arm: Arm, seed: int, steps: int) -> StudentModule:
        shared: dict[str, Any] = {
            "student": self.student,
            "optimizer": partial(torch.optim.AdamW, **self.optimizer),
            "warmup_steps": round(self.warmup_share * steps),
            "generate_tokens": 0,
        }
        if arm.stage_1 is None:
            return SFT(**shared)
        start = round(arm.stage_1 * steps)
        on_policy = OnPolicy(start=start if start < steps else -1, share=1.0, tokens=self.tokens, seed=seed)
        return Distillation(
            teacher=self.options.teacher, on_policy=on_policy, on_policy_objective=arm.stage_2, **shared
        )

    def steps_at_equal_time(self, rows: Sequence[Row]) -> dict[str, int]:
        """Steps of each arm but the two-stage ones that take about as long as two_stage, from the first seed's rows."""
        seconds = {row["name"]: row["seconds"] / row["steps"] for row in rows}
        budget = seconds[TIME_REFERENCE] * self.options.steps
        return {name: max(1, round(budget / seconds[name])) for name in seconds if not name.startswith(TIME_REFERENCE)}


def study(options: argparse.Namespace, student: Path) -> list[Row]:
    """All rows: the teacher's and the untrained student's first, then seed by seed; written as they finish."""
    write_half(options.teacher, student)
    shared = Study(options, student)
    timed = [arm for arm in options.arms if not arm.startswith(TIME_REFERENCE) and TIME_REFERENCE in options.arms]
    bar = tqdm(total=2 + len(options.seeds) * (len(options.arms) + len(timed)), desc="Study", unit="run")

    def done(row: Row) -> Row:
        bar.update()
        return row

    with bar:
        rows = [done(shared.reference("teacher", lambda: shared.judge.teacher.model))]
        rows.append(done(shared.reference("untrained", lambda: load_model(shared.student))))
        plan: dict[str, int] = {}
        for seed in options.seeds:
            of_seed = []
            for arm in options.arms:
                bar.set_postfix_str(f"{arm}, seed {seed}, {options.steps} steps")
                of_seed.append(done(shared.run("steps", arm, seed, options.steps)))
            plan = plan or (shared.steps_at_equal_time(of_seed) if timed else {})
            for arm in timed:
                bar.set_postfix_str(f"{arm}, seed {seed}, {plan[arm]} steps")
                of_seed.append(done(shared.run("time", arm, seed, plan[arm])))
            rows += of_seed
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="runs/quickstart/teacher/student", help="Hugging Face folder")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of every arm (default: 40)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run of each arm for each seed")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(ARMS),
        metavar="ARM",
        help=f"{', '.join(ARMS)} (default: all); the comparison at equal time needs {TIME_REFERENCE}",
    )
    parser.add_argument("--lr", type=float, help="highest learning rate of all arms (default: the recipe's)")
    parser.add_argument("--test-size", type=int, default=255, help="held-out questions (default: 255)")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="whose data, optimizer and precision to use")
    parser.add_argument("--out", type=Path, default=Path("docs/results/distillation"), help="folder of rows and plots")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rows and versions to this file")
    options = parser.parse_args(arguments)
    if options.steps < 2 or len(set(options.seeds)) < len(options.seeds):
        parser.error(f"expected 2 steps or more and different seeds, found {options.steps} and {options.seeds}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the page."""
    options = parse(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    disable_progress_bar()  # of loading models, between ours
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    with tempfile.TemporaryDirectory() as folder:
        rows = study(options, Path(folder) / "student")
    titles = {name: ARMS[name].title for name in options.arms}
    words = sys.argv[1:] if arguments is None else arguments
    page = write_page(rows, titles, options.out, " ".join(["python -m benchmarks.study_distillation", *words]))
    flat = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]
    report(flat, {}, PACKAGES, options.json)
    print(f"wrote {page}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
