"""Memory levers: seconds and peak memory of one distillation step without chunks, under each overlay, and under all together.

    python -m benchmarks.memory [OVERLAY ...] [--model REFERENCE] [--batch-size N] [--length TOKENS] [--json FILE]

Every side is `python train.py fit --config configs/distill.yaml` with its overlays, in a process of its own that waits for its
turn before each step, and is measured beside one without them: the ratios are of such pairs.  Steps are of stage 1 (answers of
the data), with the model as its own teacher.  Peak memory is that of the process in main memory (VmHWM, reset before each step),
or what torch allocated at most on a GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer

from benchmarks.harness import interleave, parser, report, spread
from benchmarks.workers import ROOT, peak_bytes, reset_peak
from models.loading.reference import load_model, load_tokenizer
from program.screen import as_command

RECIPE = "configs/distill.yaml"
OVERLAYS = ("checkpointing", "adam8bit", "bf16_weights", "lora", "teacher_int8")
TURNS = "POTSTILL_TURNS"  # file descriptors of the worker: to read turns from, to answer to


class TakeTurns(Callback):
    """Wait for a line before every step, and answer with a JSON line after it: `peak_bytes`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open both pipes."""
        turns, answers = map(int, os.environ[TURNS].split(","))
        self._turns, self._answers = os.fdopen(turns), os.fdopen(answers, "w")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Wait, then forget earlier peaks."""
        if not self._turns.readline():
            os._exit(0)  # the benchmark has ended: nothing is to be saved
        reset_peak()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Answer when the step is done on the device, too."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        answer = {"peak_bytes": peak_bytes(), "tokens": int(batch["attention_mask"].sum())}
        print(json.dumps(answer), file=self._answers, flush=True)


class Worker:
    """A run of its own that does one step at a time.

    Args:
        overlays: Files that change the recipe.
        settings: More such settings, for all sides.
        folder: Where it may write.
    """

    def __init__(self, overlays: Sequence[Path], settings: Mapping[str, Any], folder: Path) -> None:
        folder.mkdir()
        shared = folder / "benchmark.yaml"
        shared.write_text(yaml.safe_dump(dict(settings)))
        files = [ROOT / RECIPE, shared, *overlays]  # overlays may add callbacks to ours
        command = [sys.executable, str(ROOT / "train.py"), "fit", "--run_dir", str(folder / "run")]
        command += [word for file in files for word in ("--config", str(file.absolute()))]
        worker_turns, turns = os.pipe()
        answers, worker_answers = os.pipe()
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT), TURNS: f"{worker_turns},{worker_answers}"},
                pass_fds=(worker_turns, worker_answers),
            )
        os.close(worker_turns)
        os.close(worker_answers)
        self._turns, self._answers = os.fdopen(turns, "w"), os.fdopen(answers)
        self.answers: list[dict[str, int]] = []

    def step(self) -> None:
        """Do one step; waits until the worker is ready.

        Raises:
            RuntimeError: The worker ended; the message holds its last lines.
        """
        try:
            print("go", file=self._turns, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            lines = "\n".join(self._log.read_text().splitlines()[-20:])
            raise RuntimeError(f"expected a step of the worker, found that it had ended; its last lines:\n{lines}")
        self.answers.append(json.loads(line))

    def close(self) -> None:
        """End the run without saving."""
        self._turns.close()
        self._answers.close()
        self._process.wait()


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
    results: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = _settings(folder, arguments.model, arguments.batch_size, arguments.length)
        whole_logits = folder / "whole_logits.yaml"
        whole_logits.write_text(yaml.safe_dump({"model": {"init_args": {"chunk_tokens": 1_000_000}}}))
        for name, files in sides(overlays, whole_logits).items():
            none, row = measure({"none": [], name: files}, settings, folder / name, arguments.repetitions)
            results += [none | {"beside": name}, row]
            ratios[f"time_{name}"] = row["median_s"] / none["median_s"]
            ratios[f"memory_{name}"] = row["peak_bytes"] / none["peak_bytes"]
    report(results, ratios, ["torch", "transformers", "torchao", "peft"], arguments.json)


def measure(
    files: Mapping[str, Sequence[Path]], settings: Mapping[str, Any], folder: Path, repetitions: int
) -> list[dict[str, Any]]:
    """One row a side, in turns."""
    folder.mkdir()
    workers = {name: Worker(overlays, settings, folder / f"{name}-run") for name, overlays in files.items()}
    try:
        seconds = interleave({name: worker.step for name, worker in workers.items()}, repetitions=repetitions)
    finally:
        for worker in workers.values():
            worker.close()
    rows = []
    for name, worker in workers.items():
        peak = max(answer["peak_bytes"] for answer in worker.answers[1:])  # the first step builds the optimizer's state
        figures = {"peak_gib": peak / 2**30, **worker.answers[-1], "peak_bytes": peak}
        rows.append({"name": name, **spread(seconds[name]), **figures})
    return rows


def _settings(folder: Path, model: str, batch_size: int, length: int) -> dict[str, Any]:
    """An overlay: the model, synthetic data that fills every sample to `length`, nothing but training, and turns."""
    source = str(folder / "model")  # converted once, so that workers start in seconds
    load_model(model).save_pretrained(source)
    load_tokenizer(model).save_pretrained(source)
    data = folder / "data.jsonl"
    # Texts in which every word is new, so that no tokenizer makes less of them than a token a word.
    rows = [{"prompt": f"Count from {n}.", "response": " ".join(map(str, range(n, n + length)))} for n in range(1, 100)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    return {
        "trainer": {**quiet, "callbacks": [{"class_path": "benchmarks.memory.TakeTurns"}]},
        "checkpoint": {"every_n_steps": 1_000_000},
        "model": {"init_args": {"student": source, "teacher": source}},
        "data": {"init_args": {"train": str(data), "batch_size": batch_size, "max_length": length}},
    }


if __name__ == "__main__":
    sys.exit(as_command(main)())
