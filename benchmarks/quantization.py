"""What does quantization leave of a model, before any training?  Formats and methods side by side, next to ModelOpt and torchao.

    python -m benchmarks.quantization --quick [--json FILE]               our best against the others' presets, one format after the other
    python -m benchmarks.quantization --qat [--json FILE]                 what training with quantizers gives back
    python -m benchmarks.quantization [--formats ...] [--out FOLDER]      formats x methods, and a page; goes on where it stopped

Everybody quantizes the projections of SmolLM2-135M and calibrates on the same 128 of the model's own answers to instructions.
Students are judged on the model's own answers to the questions of MT-Bench: KL(unquantized || student) in nats per answer token,
top-1 agreement, and perplexity of those answers.  All this is computed in float32: bfloat16 alone has a KL of 0.001.
The quick command judges on every second batch of these conversations.

It takes about half an hour on two cores, the study about a day.  The others come with `pip install -e .[bench]`.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.chats import answered, calibration_prompts, held_out_prompts
from benchmarks.harness import report
from benchmarks.quantization_arms import ARMS, COMPARISONS, Arm
from benchmarks.quantization_page import write_page
from benchmarks.quantization_peers import Peer
from benchmarks.quantization_training import STEPS, training_rows
from benchmarks.study import Row, Rows, flat, machine
from models.evaluation import evaluate
from models.pretrained import load_model, load_tokenizer
from models.quantization.choice import bits_of
from models.teacher import RememberingTeacher, Teacher

MODEL = "package:smollm2-135m-instruct"
CALIBRATION_SAMPLES = 128
QUICK_EVERY = 2
PACKAGES = ("torch", "transformers", "nvidia-modelopt", "torchao")


class Bench:
    """The model, its conversations, and how a student is quantized and judged.

    Args:
        samples: Conversations that everybody calibrates on.
        every: 1 to judge on all batches of held-out conversations, 2 on every second one, and so on.
    """

    def __init__(self, samples: int = CALIBRATION_SAMPLES, every: int = 1) -> None:
        self.reference = MODEL
        self.model = load_model(MODEL).requires_grad_(False)
        self.tokenizer = load_tokenizer(MODEL)
        prompts = calibration_prompts(samples)
        self.calibration = answered(self.model, self.tokenizer, MODEL, prompts)
        self.held_out = answered(self.model, self.tokenizer, MODEL, held_out_prompts())[::every]
        self.teacher = RememberingTeacher(Teacher(MODEL, dtype=torch.float32))

    def row(self, arm: Arm | Peer) -> Row:
        """One student, quantized and judged; `bits` are those of a stored weight, with its share of the scales."""
        student = copy.deepcopy(self.model)
        started = time.perf_counter()
        arm.quantize(student, self.calibration)
        made = {"seconds": time.perf_counter() - started, "bits": bits_of(arm.format)}
        figures = evaluate(student, self.held_out, tokenizer=self.tokenizer, teacher=self.teacher, dtype=torch.float32)
        return {"format": arm.format, "arm": arm.name, **made, **figures}


def quick(samples: int) -> list[Row]:
    """The students that the project promises something about."""
    arms = list(dict.fromkeys(arm for pair in COMPARISONS.values() for arm in pair))
    _check_installed(arms)
    bench, rows = Bench(samples, every=QUICK_EVERY), []
    for arm in arms:
        rows.append(bench.row(arm))
        print(_line(rows[-1]), flush=True)
    return rows


def quick_ratios(rows: Sequence[Row]) -> dict[str, float]:
    """KL of ours over KL of what it is compared with."""
    kl = {(row["format"], row["arm"]): row["kl"] for row in rows}
    return {
        name: kl[ours.format, ours.name] / kl[theirs.format, theirs.name]
        for name, (ours, theirs) in COMPARISONS.items()
    }


def trained(samples: int, steps: int) -> tuple[list[Row], dict[str, float]]:
    """Our calibrated FP8 and INT4, and what distillation with quantizers in place makes of them; KL after over KL before."""
    bench, rows, ratios = Bench(samples, every=QUICK_EVERY), [], {}
    for name, arm in (("fp8_qat_kl", COMPARISONS["fp8_kl"][0]), ("int4_qat_kl", COMPARISONS["int4_kl"][0])):
        assert isinstance(arm, Arm)
        before, after = training_rows(bench, arm, steps=steps)
        rows += [before, after]
        ratios[name] = after["kl"] / before["kl"]
    return rows, ratios


def study(formats: Sequence[str], out: Path) -> list[Row]:
    """All rows of these formats, written as they finish."""
    store, rows, bench = Rows(out / "rows"), [], None
    wanted = [arm for format in formats for arm in ARMS[format]]
    _check_installed(wanted)
    for arm in (bar := tqdm(wanted, desc="Study", unit="student")):
        bar.set_postfix_str(f"{arm.format}: {arm.name}")
        name, made = _file_name(arm), {"model": MODEL, **asdict(arm)}
        row = store.find(name, made)
        if row is None:
            bench = bench or Bench()
            row = {**bench.row(arm), "settings": made, "machine": machine(PACKAGES)}
            store.write(name, row)
            tqdm.write(_line(row))
        rows.append(row)
    return rows


def _check_installed(arms: Sequence[Arm | Peer]) -> None:
    for arm in arms:
        if isinstance(arm, Peer):
            arm.check_installed()


def _file_name(arm: Arm | Peer) -> str:
    return f"{arm.format}, {arm.name}".replace(" ", "_").replace(",", "")


def _line(row: Row) -> str:
    return f"{row['format']}: {row['arm']}: KL {row['kl']:.5f} in {row['seconds']:.0f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark or the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="our best against the others' presets only")
    parser.add_argument("--qat", action="store_true", help="quantization-aware training of our best FP8 and INT4")
    text = "conversations that everybody calibrates on, with --quick and --qat (default: %(default)s)"
    parser.add_argument("--samples", type=int, default=CALIBRATION_SAMPLES, help=text)
    parser.add_argument("--steps", type=int, default=STEPS, help="of that training (default: %(default)s)")
    parser.add_argument(
        "--formats", nargs="+", choices=ARMS, default=list(ARMS), metavar="FORMAT", help=", ".join(ARMS)
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/quantization"), help="rows and plot; the page lies beside it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results, ratios and versions to this file")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    if options.qat:
        rows, ratios = trained(options.samples, options.steps)
        report(rows, ratios, PACKAGES, options.json)
        return
    if options.quick:
        rows = quick(options.samples)
        report(rows, quick_ratios(rows), PACKAGES, options.json)
        return
    rows = study(options.formats, options.out)
    words = sys.argv[1:] if arguments is None else arguments
    page = write_page(rows, options.out, " ".join(["python -m benchmarks.quantization", *words]))
    report(flat(rows), {}, PACKAGES, options.json)
    print(f"wrote {page}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
