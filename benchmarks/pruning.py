"""What does structured pruning leave of a model, before any training?  Scores, repairs and allocations side by side.

    python -m benchmarks.pruning --quick [--json FILE]      OSSCAR with repair against the activation score: a few minutes
    python -m benchmarks.pruning [--out FOLDER]             scores x sparsities, with a page: hours, goes on where it stopped

Every student is cut from SmolLM2-135M on the same calibration batches (128 of the model's own answers to instructions) and judged on
its own answers to the questions of MT-Bench: KL(dense || student) in nats per answer token, top-1 agreement, and perplexity of those
answers.  Computation is in bfloat16 autocast, statistics and solutions in float64.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.chats import answered, calibration_prompts, held_out_prompts
from benchmarks.harness import report
from benchmarks.study import Row, Rows, machine
from models.architecture import count_parameters
from models.evaluation import evaluate
from models.pretrained import load_model, load_tokenizer
from models.pruning.cut import PruningSettings, Targets, plan_cut, repair_cut
from models.structure import replay
from models.teacher import RememberingTeacher, Teacher

MODEL = "package:smollm2-135m-instruct"
CALIBRATION_SAMPLES = 128
PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Arm:
    """One way to prune.

    Args:
        score: See `models.pruning.cut.PruningSettings`.
        repair: The same.
        allocation: The same.
    """

    score: str
    repair: str
    allocation: str = "uniform"

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.score}, {self.repair} repair, {self.allocation}".replace("none repair", "no repair")

    @property
    def settings(self) -> PruningSettings:
        """The arm as settings."""
        return PruningSettings(**asdict(self))


CUTS = {
    "mlp 37.5 %": Targets(neurons=960),
    "kv 1 of 3": Targets(kv_groups=2),
    "mlp 25 %": Targets(neurons=1152),
    "mlp 50 %": Targets(neurons=768),
    "depth 20 %": Targets(layers=24),
    "mlp 25 % and kv 1 of 3": Targets(neurons=1152, kv_groups=2),
    "hidden 11 %": Targets(hidden=512),
}
QUICK_CUTS = ("mlp 37.5 %", "kv 1 of 3")
BASELINE = Arm("activation", "none")
QUICK_ARMS = (BASELINE, Arm("osscar", "sequential"), Arm("osscar", "sequential", "per_layer"))
ARMS = (
    *QUICK_ARMS,
    Arm("osscar", "none"),
    Arm("osscar", "layerwise"),
    Arm("osscar", "layerwise", "per_layer"),
    Arm("activation", "sequential"),
    Arm("taylor", "none"),
    Arm("taylor", "sequential"),
    Arm("wanda", "none"),
    Arm("magnitude", "none"),
    Arm("random", "none"),
    Arm("random", "sequential"),
)


class Bench:
    """The model, its conversations, and how a student is cut and judged."""

    def __init__(self) -> None:
        self.model = load_model(MODEL).requires_grad_(False)
        self.tokenizer = load_tokenizer(MODEL)
        prompts = calibration_prompts(CALIBRATION_SAMPLES)
        self.calibration = answered(self.model, self.tokenizer, MODEL, prompts)
        self.held_out = answered(self.model, self.tokenizer, MODEL, held_out_prompts())
        self._teacher = RememberingTeacher(Teacher(MODEL, dtype=torch.bfloat16))

    def cut(self, targets: Targets, settings: PruningSettings) -> tuple[PreTrainedModel, float]:
        """A student, and the seconds that it took to choose, cut and repair it."""
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            edits = plan_cut(self.model, self.calibration, targets, settings)
            student = copy.deepcopy(self.model)
            replay(student, edits)
            repair_cut(student, self.model, edits, self.calibration, settings)
        return student, time.perf_counter() - started

    def judge(self, student: PreTrainedModel) -> dict[str, float]:
        """`kl`, `top1_agreement` and `perplexity` on the held-out conversations."""
        return evaluate(student, self.held_out, tokenizer=self.tokenizer, teacher=self._teacher)

    def row(self, cut: str, arm: Arm) -> Row:
        """One student, cut and judged."""
        student, seconds = self.cut(CUTS[cut], arm.settings)
        figures = self.judge(student)
        return {"cut": cut, "arm": arm.name, "seconds": seconds, "parameters": count_parameters(student), **figures}


def quick_ratios(rows: Sequence[Row]) -> dict[str, float]:
    """KL of OSSCAR with repair over KL of the activation score, with sizes per layer and with the same size everywhere."""
    kl = {(row["cut"], row["arm"]): row["kl"] for row in rows}
    ratios = {}
    for cut, name in zip(QUICK_CUTS, ("mlp", "kv"), strict=True):
        for arm in QUICK_ARMS[1:]:
            suffix = "" if arm.allocation == "per_layer" else "_uniform"
            if (cut, arm.name) in kl:
                ratio = kl[cut, arm.name] / kl[cut, BASELINE.name]
                ratios[f"osscar_kl_over_activation_kl_{name}{suffix}"] = ratio
    return ratios


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmark or the study."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="OSSCAR and the activation score at two sparsities only")
    options.add_argument("--out", type=Path, default=Path("docs/results/pruning"), help="rows of the study")
    options.add_argument("--json", type=Path, metavar="FILE", help="write results, ratios and versions to this file")
    settings = options.parse_args(args)
    disable_progress_bar()
    bench = Bench()
    cuts, arms = (QUICK_CUTS, QUICK_ARMS) if settings.quick else (tuple(CUTS), ARMS)
    rows = []
    store = None if settings.quick else Rows(settings.out / "rows")
    for cut in cuts:
        for arm in arms:
            name, made = f"{cut}, {arm.name}".replace(" ", "_"), {"cut": asdict(CUTS[cut]), **asdict(arm.settings)}
            row = store.find(name, made) if store else None
            if row is None:
                row = bench.row(cut, arm)
                if store:
                    store.write(name, {**row, "settings": made, "machine": machine(PACKAGES)})
            rows.append(row)
            print(f"{cut}: {arm.name}: KL {row['kl']:.4f} in {row['seconds']:.0f} s", flush=True)
    report(rows, quick_ratios(rows), PACKAGES, settings.json)


if __name__ == "__main__":
    main()
