"""Study of quantization, before and after training, side by side with ModelOpt and torchao.

    python -m benchmarks.quantization --quick [--json FILE]               our best against the others' presets, one format after the other
    python -m benchmarks.quantization --qat [--json FILE]                 our best before and after distillation with quantizers in place
    python -m benchmarks.quantization [--formats ...] [--out FOLDER]      formats x methods, ways to train, and graphs

Everybody quantizes the projections of SmolLM2-135M and calibrates on the same 64 of the model's own answers to instructions.
Students are judged on every second batch of the model's own answers to the questions of MT-Bench: KL(unquantized || student) in nats
per answer token, top-1 agreement, and perplexity of those answers.  All this is computed in float32: bfloat16 alone has a KL of 0.001.

The first two commands take about half an hour each on two cores, the third about a day.  It goes on where it stopped, and so do the others
with `--out`.  The others' packages come with `pip install -e .[bench]`.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.chats import answered, calibration_prompts, held_out_prompts
from benchmarks.harness import parser, report
from benchmarks.quantization.arms import ARMS, COMPARISONS, INT4, Arm, HeadArm, best
from benchmarks.quantization.graphs import graph_rows
from benchmarks.quantization.peers import Peer
from benchmarks.quantization.training import DISTILLED, LEARNED, ON_ALL, STEPS, WAYS, learning_rate, trained_row
from benchmarks.study import Row, Rows, finish, flat
from benchmarks.trained import quiet
from datamodules.collate import Batch
from models.evaluation.answers import evaluate
from models.loading.reference import load_model, load_tokenizer
from models.post_training.format_choice import UNQUANTIZED, bits_of
from models.quantization.formats import FORMATS
from models.teacher import RememberingTeacher, Teacher
from program.screen import as_command

MODEL = "package:smollm2-135m-instruct"
OUT = Path("docs/results/quantization")
CALIBRATION_SAMPLES = 64
JUDGED_EVERY = 2
TRAINED = ("fp8_e4m3", INT4)
TRAININGS = {  # name of a ratio -> the way
    best("fp8_e4m3"): {"fp8_qat_kl": DISTILLED},
    best(INT4): {"int4_qat_kl": LEARNED, "int4_on_all_kl": ON_ALL},
}
PACKAGES = ("torch", "transformers", "onnxruntime", "nvidia-modelopt", "torchao")


class Bench:
    """The model, its conversations, and how a student is quantized and judged."""

    def __init__(self, samples: int) -> None:
        self.reference = MODEL
        self.model = load_model(MODEL).requires_grad_(False)
        self.tokenizer = load_tokenizer(MODEL)
        prompts = calibration_prompts(samples)
        self.calibration = answered(self.model, self.tokenizer, MODEL, prompts)
        self.held_out = answered(self.model, self.tokenizer, MODEL, held_out_prompts())[::JUDGED_EVERY]
        self.teacher = RememberingTeacher(Teacher(MODEL, dtype=torch.float32))
        self._start: tuple[Arm, PreTrainedModel] | None = None

    def quantized(self, arm: Arm | HeadArm | Peer, more: Sequence[Batch] = ()) -> PreTrainedModel:
        """A student after calibration, on more conversations than everybody's if there are some."""
        student = copy.deepcopy(self.model)
        arm.quantize(student, [*self.calibration, *more])
        return student

    def start(self, arm: Arm) -> PreTrainedModel:
        """A student of one's own to train; the latest is kept, as several ways start from it."""
        if self._start is None or self._start[0] != arm:
            self._start = (arm, self.quantized(arm))
        return copy.deepcopy(self._start[1])

    def judge(self, student: PreTrainedModel) -> dict[str, float]:
        """`kl`, `top1_agreement` and `perplexity` on the held-out answers."""
        return evaluate(student, self.held_out, tokenizer=self.tokenizer, teacher=self.teacher, dtype=torch.float32)


class Study:
    """Students of one command, each made once and kept as a row."""

    def __init__(self, out: Path, samples: int) -> None:
        self.samples = samples
        self.rows = Rows(out, PACKAGES, {"model": MODEL, "samples": samples, "judged_every": JUDGED_EVERY})

    @cached_property
    def bench(self) -> Bench:
        """Made when the first row is missing."""
        return Bench(self.samples)

    def calibrated(self, arms: Sequence[Arm | HeadArm | Peer]) -> list[Row]:
        """Students after calibration alone; `bits` are those of a stored weight, with its share of the scales."""
        for arm in arms:
            if isinstance(arm, Peer):
                arm.check_installed()

        def make(arm: Arm | HeadArm | Peer) -> Row:
            started = time.perf_counter()
            student = self.bench.quantized(arm)
            made = {"seconds": time.perf_counter() - started, "bits": bits_of(arm.format)}
            return {"format": arm.format, "arm": arm.name, **made, **self.bench.judge(student)}

        return self._rows(
            "Calibration", {f"{arm.format}, {arm.name}": (asdict(arm), partial(make, arm)) for arm in arms}
        )

    def trained(self, arms: Sequence[Arm], ways: Sequence[str], steps: int) -> list[Row]:
        """Students after training from their calibrated start."""

        def make(arm: Arm, way: str) -> Row:
            (before,) = self.calibrated([arm])
            row = trained_row(self.bench, arm, way, steps)
            return row | {"kl_before": before["kl"], "recovered": 1 - row["kl"] / before["kl"]}

        runs = {}
        for arm, way in product(arms, ways):
            settings = {**asdict(arm), "way": way, "steps": steps, "learning_rate": learning_rate(arm.format)}
            runs[f"{arm.format}, {way}, {steps} steps"] = settings, partial(make, arm, way)
        return self._rows("Ways to train", runs)

    def graphs(self, formats: Sequence[str], repetitions: int) -> Row:
        """Size and speed of the formats' graphs in one run, under `graphs`."""
        measured = [format for format in formats if format != UNQUANTIZED]
        settings = {"formats": measured, "repetitions": repetitions}

        def make() -> Row:
            return {"graphs": graph_rows(self.bench, measured, repetitions)}

        return self.rows.find_or_make("graphs", settings, make)

    def _rows(self, title: str, runs: Mapping[str, tuple[dict[str, Any], Callable[[], Row]]]) -> list[Row]:
        """The rows of runs by name, each with what it depends on."""
        for name, (settings, _) in runs.items():
            self.rows.find(name, settings)  # one of other settings is refused before any is made
        rows = []
        for name, (settings, make) in tqdm(runs.items(), desc=title, unit="student"):
            rows.append(self.rows.find_or_make(name, settings, make))
            tqdm.write(f"{name}: KL {rows[-1]['kl']:.5f}")
        return rows


def quick(study: Study) -> tuple[list[Row], dict[str, float]]:
    """The students that the project promises something about, and KL of ours over KL of what it is compared with."""
    rows = study.calibrated(list(dict.fromkeys(arm for pair in COMPARISONS.values() for arm in pair)))
    kl = {(row["format"], row["arm"]): row["kl"] for row in rows}
    pairs = {name: [kl[arm.format, arm.name] for arm in pair] for name, pair in COMPARISONS.items()}
    return rows, {name: ours / theirs for name, (ours, theirs) in pairs.items()}


def trained(study: Study, steps: int) -> tuple[list[Row], dict[str, float]]:
    """Our calibrated FP8 and INT4, and what distillation with quantizers in place makes of them; KL after over KL before.

    `int4_on_all_kl` is not of training alone: what is trained was calibrated on more conversations than what it is compared with.
    """
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for arm, ways in TRAININGS.items():
        [before], after = study.calibrated([arm]), study.trained([arm], list(ways.values()), steps)
        rows += [before, *after]
        ratios |= {name: row["kl"] / before["kl"] for name, row in zip(ways, after, strict=True)}
    return rows, ratios


def whole(study: Study, options: argparse.Namespace) -> list[Row]:
    """All rows of these formats."""
    calibrated = study.calibrated([arm for format in options.formats for arm in ARMS[format]])
    starts = [best(format) for format in options.formats if format in options.train]
    after = study.trained(starts, options.ways, options.steps)
    graphs = [study.graphs(options.formats, options.repetitions)] if options.repetitions else []
    return [*calibrated, *after, *graphs]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark or the study."""
    options_of = parser(__doc__, repetitions=15)
    add = options_of.add_argument
    add("--quick", action="store_true", help="our best against the others' presets only")
    add("--qat", action="store_true", help="distillation with quantizers, of our best FP8 and INT4 only")
    text = "conversations that everybody calibrates on (default: %(default)s)"
    add("--samples", type=int, default=CALIBRATION_SAMPLES, help=text)
    add("--formats", nargs="+", choices=ARMS, default=list(ARMS), metavar="FORMAT", help=", ".join(ARMS))
    text = "which of the formats are trained (default: %(default)s)"
    add("--train", nargs="*", choices=list(FORMATS), default=list(TRAINED), metavar="FORMAT", help=text)
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="how they are trained (default: all ways)")
    add("--steps", type=int, default=STEPS, help="of training, of eight conversations each (default: %(default)s)")
    text = f"where rows and pictures are kept (default: {OUT}; with --quick and --qat, nothing is)"
    add("--out", type=Path, help=text)
    options = options_of.parse_args(arguments)
    if options.quick and options.qat:
        options_of.error("expected --quick or --qat, found both; run one after the other")
    quiet()
    if not (options.quick or options.qat):
        options.out = options.out or OUT
        finish(whole(Study(options.out, options.samples), options), PACKAGES, options.out, options.json)
        return
    with tempfile.TemporaryDirectory() as temporary:
        study = Study(options.out or Path(temporary), options.samples)
        rows, ratios = trained(study, options.steps) if options.qat else quick(study)
    report(flat(rows), ratios, PACKAGES, options.json)


if __name__ == "__main__":
    sys.exit(as_command(main)())
