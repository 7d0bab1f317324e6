"""What `python train.py plan` says of memory, against what runs take on this CPU.

    python -m benchmarks.planner [RECIPE ...] [--json FILE]

Five recipes of SmolLM2-135M, each in a process of its own: fine-tuning, distillation, the same with LoRA, with activation checkpointing,
and with a pruning event.  Measured is the largest resident memory of four steps beyond that of the process without models; `worst` is
the ratio of predicted to measured that is furthest from 1.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning import Callback

from benchmarks.harness import parser, report
from benchmarks.workers import peak_bytes, reset_peak
from models.loading.reference import load_model, load_tokenizer
from models.planning.plan import GPUS, Machine, memory, workload_of
from program.screen import as_command

MODEL = "package:smollm2-135m-instruct"
BATCH, LENGTH, STEPS = 8, 128, 4
RECIPES: dict[str, list[str]] = {
    "sft": ["sft"],
    "distill": ["distill"],
    "lora": ["distill", "lora"],
    "checkpointing": ["distill", "checkpointing"],
    "pruning": ["compress"],
}


class Watch(Callback):
    """Predicts when the models are there, and measures the largest of all steps."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The process without models is what it is now, less the models."""
        work = workload_of(
            pl_module, trainer.datamodule, trainer, length=LENGTH, mean_length=LENGTH, answer_share=0.97, device="cpu"
        )
        found = memory(work, Machine(1, GPUS["h100"], sharded=False, utilisation=1.0))
        moment = "pruning event" if work.events else "training step"
        self.predicted, parts = found["moments"][moment], found["parts"]
        reset_peak()
        self.without = peak_bytes() - parts["weights"] - parts["teacher"]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say both."""
        print(json.dumps({"predicted": self.predicted, "measured": peak_bytes() - self.without}), flush=True)


def run(recipe: str, folder: Path) -> None:
    """Train a few steps in this process, on rows that fill every sample."""
    import train

    callbacks: list[dict[str, Any]] = [{"class_path": "benchmarks.planner.Watch"}]
    if recipe == "pruning":
        pruning = {"mlp_sparsity": 0.25, "start_step": 2, "end_step": 2, "calibration_batches": 2, "judge_batches": 0}
        callbacks.insert(0, {"class_path": "GradualPruning", "init_args": pruning})
    overlay = {
        "trainer": {
            "max_steps": STEPS, "callbacks": callbacks, "logger": False, "enable_progress_bar": False,
            "limit_val_batches": 0, "accelerator": "cpu",
        },
        "checkpoint": {"every_n_steps": 1_000_000},
        "model": {"init_args": {"student": str(folder / "model"), "warmup_steps": 1}},
        "data": {"init_args": {"train": str(folder / "data.jsonl"), "batch_size": BATCH, "max_length": LENGTH}},
    }  # fmt: skip
    if recipe != "sft":
        overlay["model"]["init_args"] |= {"teacher": str(folder / "model"), "on_policy": {"start": -1}}  # type: ignore[index]
    path = folder / f"{recipe}.yaml"
    path.write_text(json.dumps(overlay))
    first, *overlays = RECIPES[recipe]
    files = [f"configs/{first}.yaml", str(path), *(f"configs/{name}.yaml" for name in overlays)]
    train.main(["fit", "--run_dir", str(folder / recipe), *(word for file in files for word in ("--config", file))])


def main() -> None:
    """Each recipe once: memory does not vary as time does."""
    options = parser(__doc__)
    options.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"some of {', '.join(RECIPES)} (default: all)")
    options.add_argument("--run", nargs=2, metavar=("RECIPE", "FOLDER"), help="what a process of its own does")
    arguments = options.parse_args()
    if arguments.run:
        return run(arguments.run[0], Path(arguments.run[1]))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        load_model(MODEL).save_pretrained(folder / "model")
        load_tokenizer(MODEL).save_pretrained(folder / "model")
        texts = [
            {"prompt": f"Count from {n}.", "response": " ".join(map(str, range(n, n + LENGTH)))} for n in range(1, 100)
        ]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        for recipe in arguments.recipes or RECIPES:
            command = [sys.executable, "-m", "benchmarks.planner", "--run", recipe, str(folder)]
            ended = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(ended.stdout.splitlines()[-1])
            rows.append({"name": recipe, **row, "ratio": row["predicted"] / row["measured"]})
            print(f"{recipe:<16}predicted {row['predicted'] / 1e9:.2f} GB, measured {row['measured'] / 1e9:.2f} GB")
    worst = max((row["ratio"] for row in rows), key=lambda ratio: max(ratio, 1 / ratio))
    report(
        rows,
        {"worst": worst, **{row["name"]: row["ratio"] for row in rows}},
        ["torch", "transformers", "peft"],
        arguments.json,
    )
    return None


if __name__ == "__main__":
    sys.exit(as_command(main)())
