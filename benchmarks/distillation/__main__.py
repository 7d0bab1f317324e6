"""Study of distillation: fine-tuning, stage 1, on-policy and two-stage, at equal optimizer steps and at equal time, over seeds.

    python -m benchmarks.distillation [--teacher FOLDER] [--steps N] [--seeds 1 2 3] [--arms ...] [--out FOLDER] [--json FILE]

The student has every second layer of the teacher; data, optimizer and precision are those of `study.yaml`.  All arms start from the same
student, see the same batches in the same order for a seed, and are judged on the same held-out questions; a seed decides the
order of the training questions and what the student samples.

Equal time, of arms beside `two_stage`: how many steps each arm gets follows from the first seed's seconds per step, so that an arm trains about as long as
two_stage does at equal steps and its learning rate still ends at 0 with the run.
An interrupted command goes on where it stopped.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.study import Row, finish, write_half
from benchmarks.trained import PACKAGES, TrainingStudy, parse, quiet, recipe_options, training_parser
from models import SFT, Distillation, StudentModule
from models.generation.on_policy import OnPolicy
from models.loading.reference import load_model
from models.losses import Objective
from program.screen import as_command

TIME_REFERENCE = "two_stage"


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    title: str  # for people
    stage_1: float | None  # share of the steps on the data's answers, before the student's own; None: no teacher at all
    stage_2: Objective = Objective()  # noqa: RUF009  (frozen)  # on the student's own answers


ARMS = {
    "sft": Arm("fine-tuning on gold answers, no teacher", None),
    "stage1": Arm("stage 1 only: forward KL on gold answers", 1.0),
    "on_policy": Arm("on-policy only: forward KL", 0.0),
    "two_stage": Arm("two-stage: forward KL, then forward KL on-policy", 0.5),
    "two_stage_reverse_kl": Arm("two-stage: ..., then reverse KL", 0.5, Objective({"reverse_kl": 1.0})),
    "two_stage_jsd": Arm("two-stage: ..., then JSD(0.5)", 0.5, Objective({"jsd": 1.0}, beta=0.5, join_ends=True)),
}


class Study(TrainingStudy):
    """The runs of this study."""

    def run(self, budget: str, arm: str, seed: int, steps: int) -> Row:
        """The row of one run."""
        about = {"name": arm, "budget": budget, "seed": seed, "steps": steps}

        def make() -> Row:
            return about | self.fit(lambda: self._module(ARMS[arm], seed, steps), seed, steps)

        return self.rows.find_or_make(f"{budget}-{arm}-{seed}", {"steps": steps}, make)

    def _module(self, arm: Arm, seed: int, steps: int) -> StudentModule:
        if arm.stage_1 is None:
            return SFT(**self.of_student(steps))
        start = round(arm.stage_1 * steps)
        on_policy = OnPolicy(start=start if start < steps else -1, share=1.0, tokens=self.tokens, seed=seed)
        answers: dict[str, Any] = {"on_policy": on_policy, "on_policy_objective": arm.stage_2}
        return Distillation(teacher=self.options.teacher, **answers, **self.of_student(steps))

    def steps_at_equal_time(self, rows: Sequence[Row]) -> dict[str, int]:
        """Steps of each arm but the two-stage ones that take about as long as two_stage, from the first seed's rows."""
        seconds = {row["name"]: row["seconds"] / row["steps"] for row in rows}
        budget = seconds[TIME_REFERENCE] * self.options.steps
        return {name: max(1, round(budget / seconds[name])) for name in seconds if not name.startswith(TIME_REFERENCE)}


def study(options: argparse.Namespace, student: Path) -> list[Row]:
    """All rows: the teacher's and the untrained student's first, then seed by seed; written as they finish."""
    write_half(options.teacher, student)
    shared = Study(options, str(student))
    timed = [arm for arm in options.arms if not arm.startswith(TIME_REFERENCE) and TIME_REFERENCE in options.arms]
    rows = [shared.reference("teacher", lambda: shared.judge.teacher.model)]
    rows.append(shared.reference("untrained", lambda: load_model(shared.student)))
    plan: dict[str, int] = {}
    for seed in tqdm(options.seeds, desc="Study", unit="seed"):
        of_seed = [shared.run("steps", arm, seed, options.steps) for arm in options.arms]
        plan = plan or (shared.steps_at_equal_time(of_seed) if timed else {})
        rows += of_seed + [shared.run("time", arm, seed, plan[arm]) for arm in timed]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing."""
    parser = training_parser(__doc__, "docs/results/distillation", ARMS, steps=40, test_size=255)
    recipe_options(parser)
    options = parse(parser, arguments)
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        rows = study(options, Path(folder) / "student")
    finish(rows, PACKAGES, options.out, options.json)


if __name__ == "__main__":
    sys.exit(as_command(main)())
