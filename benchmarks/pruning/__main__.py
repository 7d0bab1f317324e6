"""Study of structured pruning before any training: scores, repairs and allocations side by side.

    python -m benchmarks.pruning --quick [--json FILE]                 OSSCAR with repair against the activation score
    python -m benchmarks.pruning [--cuts ...] [--out FOLDER]           scores x sparsities, and speed; goes on where it stopped

Every student is cut from SmolLM2-135M on the same calibration batches (128 of the model's own answers to instructions) and judged on
its own answers to the questions of MT-Bench: KL(dense || student) in nats per answer token, top-1 agreement, and perplexity of those
answers.  Computation is in bfloat16 autocast, statistics and solutions in float64.  What a score knows of the dense model is
collected once and counts in the seconds of every student that uses it.

The quick command takes about 10 minutes on two cores, the study some hours.  The page beside its rows
shows those of `python -m benchmarks.pruning.recovery`, too.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.chats import answered, calibration_prompts, held_out_prompts
from benchmarks.harness import parser, report
from benchmarks.pruning.arms import ARMS, BASELINE, CUTS, QUICK_ARMS, QUICK_CUTS, Arm, Peer
from benchmarks.pruning.speed import speeds
from benchmarks.study import Row, Rows, finish, flat
from models.architecture import count_parameters
from models.evaluation.answers import evaluate
from models.loading.reference import load_model, load_tokenizer
from models.pruning.cut import Targets, plan_cut, rank_units, repair_cut
from models.structure.edits import replay
from models.structure.shape import shape_of
from models.teacher import RememberingTeacher, Teacher
from program.screen import as_command

MODEL = "package:smollm2-135m-instruct"
CALIBRATION_SAMPLES = 128
PACKAGES = ("torch", "transformers", "onnxruntime")


class Bench:
    """The model, its conversations, and how a student is cut and judged."""

    def __init__(self) -> None:
        self.model = load_model(MODEL).requires_grad_(False)
        self.tokenizer = load_tokenizer(MODEL)
        prompts = calibration_prompts(CALIBRATION_SAMPLES)
        self.calibration = answered(self.model, self.tokenizer, MODEL, prompts)
        self.held_out = answered(self.model, self.tokenizer, MODEL, held_out_prompts())
        self._teacher = RememberingTeacher(Teacher(MODEL, dtype=torch.bfloat16))
        self._made: dict[tuple[Any, ...], tuple[Any, float]] = {}

    def row(self, cut: str, arm: Arm | Peer) -> Row:
        """One student, cut and judged; `layers` holds neurons, query heads and groups of each."""
        with torch.autocast("cpu", torch.bfloat16):
            targets = CUTS[cut]
            student, seconds = self._cut(targets, arm) if isinstance(arm, Arm) else self._cut_by_peer(targets, arm)
        shape = shape_of(student)
        layers = [[layer.neurons, layer.query_heads, layer.kv_groups] for layer in shape.layers]
        sizes = {"parameters": count_parameters(student), "hidden": shape.hidden, "layers": layers}
        figures = evaluate(student, self.held_out, tokenizer=self.tokenizer, teacher=self._teacher)
        return {"cut": cut, "arm": arm.name, "seconds": seconds, **sizes, **figures}

    def _cut(self, targets: Targets, arm: Arm) -> tuple[PreTrainedModel, float]:
        """A student, and the seconds that it took to rank, choose, cut and repair it."""
        model, batches, settings = self.model, self.calibration, arm.settings
        ranking, ranked_in = None, 0.0
        if targets.neurons or targets.kv_groups:
            ranking, ranked_in = self._once((arm.score, arm.swaps), lambda: rank_units(model, batches, settings))
        of_layers = targets == Targets(layers=targets.layers)  # a search for them takes minutes, and serves all repairs
        key = (targets.layers, arm.depth) if of_layers else (targets, arm)
        edits, planned_in = self._once(key, lambda: plan_cut(model, batches, targets, settings, ranking=ranking))
        started = time.perf_counter()
        student = copy.deepcopy(model)
        replay(student, edits)
        repair_cut(student, model, edits, batches, settings)
        return student, ranked_in + planned_in + time.perf_counter() - started

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> tuple[Any, float]:
        """What serves several students, and the seconds that it took, which count for each of them."""
        if key not in self._made:
            started = time.perf_counter()
            self._made[key] = make(), time.perf_counter() - started
        return self._made[key]

    def _cut_by_peer(self, targets: Targets, peer: Peer) -> tuple[PreTrainedModel, float]:
        from benchmarks.pruning.peer import torch_pruning_edits  # needs the extra `bench`

        started = time.perf_counter()
        edits = torch_pruning_edits(self.model, self.calibration, targets, peer.score)
        student = copy.deepcopy(self.model)
        replay(student, edits)
        return student, time.perf_counter() - started


def quick() -> list[Row]:
    """The two cuts that the project promises something about."""
    bench, rows = Bench(), []
    for cut in QUICK_CUTS:
        for arm in QUICK_ARMS:
            rows.append(bench.row(cut, arm))
            print(_line(rows[-1]), flush=True)
    return rows


def quick_ratios(rows: Sequence[Row]) -> dict[str, float]:
    """KL of OSSCAR with repair over KL of the activation score, with sizes per layer and with the same size everywhere."""
    kl = {(row["cut"], row["arm"]): row["kl"] for row in rows}
    return {
        f"osscar_kl_over_activation_kl_{name}{'' if arm.allocation == 'per_layer' else '_uniform'}": kl[cut, arm.name]
        / kl[cut, BASELINE.name]
        for cut, name in zip(QUICK_CUTS, ("mlp", "kv"), strict=True)
        for arm in QUICK_ARMS[1:]
    }


def study(cuts: Sequence[str], out: Path) -> list[Row]:
    """All rows of these cuts, written as they finish."""
    store, rows, bench = Rows(out, PACKAGES, {"model": MODEL}), list[Row](), cache(Bench)

    def make(cut: str, arm: Arm | Peer) -> Row:
        row = bench().row(cut, arm)
        tqdm.write(_line(row))
        return row

    wanted = [(cut, arm) for cut in cuts for arm in ARMS[cut]]
    for cut, arm in (bar := tqdm(wanted, desc="Study", unit="student")):
        bar.set_postfix_str(f"{cut}: {arm.name}")
        settings = {"cut": asdict(CUTS[cut]), **asdict(arm)}
        rows.append(store.find_or_make(f"{cut}, {arm.name}", settings, partial(make, cut, arm)))
    return rows


def _line(row: Row) -> str:
    return f"{row['cut']}: {row['arm']}: KL {row['kl']:.4f} in {row['seconds']:.0f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark or the study."""
    options_of = parser(__doc__, repetitions=None, out="docs/results/pruning")
    options_of.add_argument(
        "--quick", action="store_true", help="OSSCAR and the activation score at two sparsities only"
    )
    text = ", ".join(CUTS).replace("%", "%%")
    options_of.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS), metavar="CUT", help=text)
    options = options_of.parse_args(arguments)
    disable_progress_bar()
    if options.quick:
        rows = quick()
        report(flat(rows), quick_ratios(rows), PACKAGES, options.json)
        return
    rows = study(options.cuts, options.out)
    rows += speeds(MODEL, rows, options.out)
    finish(rows, PACKAGES, options.out, options.json)


if __name__ == "__main__":
    sys.exit(as_command(main)())
