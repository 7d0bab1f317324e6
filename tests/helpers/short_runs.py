"""A recipe in a few steps: an overlay that moves the steps of its callbacks and changes nothing else of them."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
STEPS = 6
#: What each callback of a recipe needs to act within STEPS steps on a tiny model; nothing else of the recipe is changed.
MOVED: dict[str, dict[str, Any]] = {
    "GradualPruning": {"start_step": 1, "end_step": 2, "events": 2, "multiple": 8, "calibration_batches": 1},
    "QuantizationAwareTraining": {"start_step": 4, "observe_steps": 1},
    "Throughput": {"every_n_steps": 2},
    "SampleCompletions": {"num_samples": 2, "max_new_tokens": 3},
    # The small graph is what takes time; engines are compiled in the quickstart's test.
    "ExportOnFitEnd": {"formats": ["hf", "onnx"], "verify_prompts": 1, "benchmark_repetitions": 0},
}


def short(recipe: str, moved: dict[str, dict[str, Any]] = MOVED) -> dict[str, Any]:
    """The overlay for `configs/<recipe>.yaml`."""
    settings = yaml.safe_load((ROOT / f"configs/{recipe}.yaml").read_text())
    callbacks = settings["trainer"]["callbacks"]
    for callback in callbacks:
        callback["init_args"] = callback.get("init_args", {}) | moved.get(callback["class_path"], {})
    model: dict[str, Any] = {"generate_tokens": 2, "warmup_steps": 1}
    if settings["model"]["class_path"] == "Distillation":
        model["on_policy"] = {"start": 2, "ramp": 1, "tokens": 4}
    trainer = {
        "max_steps": STEPS,
        "val_check_interval": 3,
        "log_every_n_steps": 1,
        "callbacks": callbacks,
        "enable_progress_bar": False,
    }
    return {"trainer": trainer, "model": {"init_args": model}}
