"""Recovery of a pruned student by distillation: one cut against three small ones, the data's answers against the student's own.

    python -m benchmarks.pruning.recovery [--teacher FOLDER] [--steps N] [--seeds 1 2 3] [--arms ...] [--out FOLDER] [--json FILE]

The studies' teacher is distilled into a copy of itself that loses 37.5 % of its MLP neurons and one of three key/value groups,
by OSSCAR with sequential repair: after the first step at once, or in three events over the first half of the steps.  Data, optimizer and
precision are those of `study.yaml`; the arms of a seed see the same batches in the same order.  An interrupted command goes on where
it stopped; `python -m benchmarks.page docs/results/pruning.md` shows it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tqdm import tqdm

from benchmarks.study import Row, check_teacher, finish
from benchmarks.trained import PACKAGES, TrainingStudy, parse, quiet, recipe_options, training_parser
from callbacks import GradualPruning
from models import Distillation
from models.generation.on_policy import OnPolicy
from program.screen import as_command


@dataclass(frozen=True)
class Arm:
    """One way to prune and recover."""

    title: str  # for people
    events: int  # number of cuts
    on_policy: bool  # train on the student's own answers, from the first step on


ARMS = {
    "one_shot": Arm("one cut after the first step, gold answers", 1, False),
    "gradual": Arm("three cuts over the first half, gold answers", 3, False),
    "one_shot_on_policy": Arm("one cut after the first step, the student's own answers", 1, True),
    "gradual_on_policy": Arm("three cuts over the first half, the student's own answers", 3, True),
}
PRUNING: dict[str, Any] = {
    "mlp_sparsity": 0.375,
    "kv_group_sparsity": 1 / 3,
    "calibration_batches": 8,
    "judge_batches": 2,
}


class Study(TrainingStudy):
    """The runs of this study."""

    def run(self, name: str, seed: int) -> Row:
        """The row of one run; its `history` is that of `GradualPruning`."""
        arm, steps = ARMS[name], self.options.steps
        about = {"name": name, "seed": seed, "steps": steps}
        schedule: dict[str, Any] = {
            "start_step": 1,
            "end_step": max(arm.events, steps // 2) if arm.events > 1 else 1,
            "events": arm.events,
        }

        def train() -> Row:
            pruning = GradualPruning(**PRUNING, **schedule, seed=seed)
            figures = self.fit(lambda: self._module(arm, seed), seed, steps, [pruning])
            last = pruning.history[-1]
            after_cut = last.get("kl_after_repair", last["kl_after_cut"])
            return {**about, **figures, "kl_after_last_cut": after_cut, "history": pruning.history}

        return self.rows.find_or_make(f"{name}-{seed}", {"steps": steps, **PRUNING, **schedule}, train)

    def _module(self, arm: Arm, seed: int) -> Distillation:
        on_policy = OnPolicy(start=0 if arm.on_policy else -1, share=1.0, tokens=self.tokens, seed=seed)
        return Distillation(teacher=self.options.teacher, on_policy=on_policy, **self.of_student(self.options.steps))


def study(options: argparse.Namespace) -> list[Row]:
    """All rows, the teacher's first, then seed by seed; written as they finish."""
    shared = Study(options, options.teacher)
    rows = [shared.reference("teacher", lambda: shared.judge.teacher.model)]
    runs = tqdm(list(product(options.seeds, options.arms)), desc="Study", unit="run")
    return rows + [shared.run(arm, seed) for seed, arm in runs]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing."""
    parser = training_parser(__doc__, "docs/results/pruning/recovery", ARMS, steps=32, test_size=120)
    recipe_options(parser)
    options = parse(parser, arguments)
    check_teacher(options.teacher)
    quiet()
    rows = study(options)
    finish(rows, PACKAGES, options.out, options.json)


if __name__ == "__main__":
    sys.exit(as_command(main)())
