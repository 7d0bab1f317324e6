"""Memory levers: seconds and peak memory of one distillation step without chunks, under each overlay, and under all together.

    python -m benchmarks.memory [OVERLAY ...] [--model REFERENCE] [--batch-size N] [--length TOKENS] [--json FILE]

Every side is `python train.py fit --config configs/distill.yaml` with its overlays, in a process of its own that waits for its
turn before each step, and is measured beside one without them: the ratios are of such pairs.  Steps are of stage 1 (answers of
the data), with the model as its own teacher.  Peak memory is that of the process in main memory (VmHWM, reset before each step),
or what torch allocated at most on a GPU.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer

from benchmarks.harness import parser, report, spread
from benchmarks.workers import ROOT, Gate, Worker, take_turns
from models.loading.reference import load_model, load_tokenizer
from program.screen import as_command

OVERLAYS = ("checkpointing", "adam8bit", "bf16_weights", "lora", "teacher_int8")


class TakeTurns(Callback):
    """Stands at the worker's gate before every step."""

    gate: Gate
    tokens = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Report the step before, and wait."""
        self.gate.arrive(tokens=self.tokens)
        self.tokens = int(batch["attention_mask"].sum())


def run(gate: Gate, folder: str, files: list[str]) -> None:
    """The worker's side: a run of a recipe and what changes it."""
    import train

    TakeTurns.gate = gate
    words = [word for file in files for word in ("--config", file)]
    sys.exit(train.entry_point(["fit", "--run_dir", folder, *words]))


def sides(overlays: Sequence[Path], whole_logits: Path) -> dict[str, list[Path]]:
    """What to compare with the recipe as it is: no chunks, each overlay alone, all together (of two that clash, the later wins)."""
    alone = {path.stem: [path] for path in overlays}
    return {"whole_logits": [whole_logits], **alone} | ({"together": list(overlays)} if len(overlays) > 1 else {})


def main() -> None:
    """Measure each side in turns with the recipe as it is: two runs at a time, so that memory is not short."""
    options = parser(__doc__)
    add = options.add_argument
    add("overlays", nargs="*", type=Path, metavar="OVERLAY", help=f"YAML files (default: {', '.join(OVERLAYS)})")
    add("--model", default="package:smollm2-135m-instruct", help="reference of student and teacher")
    add("--batch-size", type=int, default=4, help="samples a step (default: 4)")
    add("--length", type=int, default=256, help="tokens a sample (default: 256)")
    arguments = options.parse_args()
    overlays = arguments.overlays or [ROOT / f"configs/{name}.yaml" for name in OVERLAYS]
    for path in overlays:
        if not path.is_file():
            raise FileNotFoundError(f"expected an overlay at {str(path)!r}, found none; name a YAML file of settings")
    results: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = [ROOT / "configs/distill.yaml", _settings(folder, arguments)]  # overlays may add callbacks to ours
        whole_logits = folder / "whole_logits.yaml"
        whole_logits.write_text(yaml.safe_dump({"model": {"init_args": {"chunk_tokens": 1_000_000}}}))
        for name, files in sides(overlays, whole_logits).items():
            pair = {"none": recipe, name: [*recipe, *files]}
            none, row = measure(pair, folder / name, arguments.repetitions)
            results += [none | {"beside": name}, row]
            ratios[f"time_{name}"] = row["median_s"] / none["median_s"]
            ratios[f"memory_{name}"] = row["peak_bytes"] / none["peak_bytes"]
    report(results, ratios, ["torch", "transformers", "torchao", "peft"], arguments.json)


def measure(files: Mapping[str, Sequence[Path]], folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """One row a side, in turns."""
    workers = {}
    for name, some in files.items():
        settings = {"folder": str(folder / f"{name}-run"), "files": [str(file.absolute()) for file in some]}
        workers[name] = Worker("benchmarks.memory:run", settings)
    rows = []
    for name, steps in take_turns(workers, repetitions=repetitions).items():
        peak = max(step["peak_bytes"] for step in steps)
        figures = {"peak_gib": peak / 2**30, "tokens": steps[-1]["tokens"], "peak_bytes": peak}
        rows.append({"name": name, **spread([step["seconds"] for step in steps]), **figures})
    return rows


def _settings(folder: Path, arguments: Namespace) -> Path:
    """An overlay: the model, synthetic data that fills every sample, nothing but training, and turns."""
    source, data, length = str(folder / "model"), folder / "data.jsonl", arguments.length
    load_model(arguments.model).save_pretrained(source)  # converted once, so that workers start in seconds
    load_tokenizer(arguments.model).save_pretrained(source)
    # Texts in which every word is new, so that no tokenizer makes less of them than a token a word.
    rows = [{"prompt": f"Count from {n}.", "response": " ".join(map(str, range(n, n + length)))} for n in range(1, 100)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    settings = {
        "trainer": {**quiet, "callbacks": [{"class_path": "benchmarks.memory.TakeTurns"}]},
        "checkpoint": {"every_n_steps": 1_000_000},
        "model": {"init_args": {"student": source, "teacher": source}},
        "data": {"init_args": {"train": str(data), "batch_size": arguments.batch_size, "max_length": length}},
    }
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


if __name__ == "__main__":
    sys.exit(as_command(main)())
