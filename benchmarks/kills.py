"""A run that was killed and resumed, again and again, equals an uninterrupted one: SIGKILL at random moments, tiny models.

    python -m benchmarks.kills --kills 300 [--json FILE]

Four recipes, between them every feature that has a state: averaged weights, adapters, two stages with replay and an adaptive share,
pruning, learned scales, phases.  Each run goes through `train.py`'s entry point in a process of its own, steps of four
micro-batches, a checkpoint after every step; it is killed at a random moment, resumed in a new run folder from the newest
checkpoint, and killed again, until one ends.  `ratios.lost` is the share of kills after which no checkpoint could be read, or only one
older than before; `ratios.different` is the share of finished chains of which a value of the last checkpoint (weights, moments,
schedules, edits, replayed answers, findings of callbacks, with the metrics of the phases) or a metric of a validation differs, bit
for bit, from the run that was left alone.
"""

import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import train
from benchmarks.harness import parser, report
from models.loading.checkpoint import read_checkpoint
from models.loading.reference import load_tokenizer
from program.progress import Bar
from program.screen import as_command

PACKAGES = ("torch", "lightning", "transformers")
TOKENIZER = "package:smollm2-135m-instruct"
STEPS, MICRO_BATCHES = 9, 4
_OF_PLACES = ("Checkpoint", "Throughput", "ModelCheckpoint")  # callbacks whose state says where or how fast

_METRIC = re.compile(r"val/(?!teacher_)")  # the teacher's own are logged once by every process

_JUDGE = {"class_path": "PhaseEvaluation", "init_args": {"generate_tokens": 0, "split": "val"}}
_PRUNE = {
    "class_path": "GradualPruning",
    "init_args": {
        **{"mlp_sparsity": 0.5, "start_step": 2, "end_step": 5, "events": 2, "multiple": 8},
        **{"calibration_batches": 2, "judge_batches": 1},
    },
}
_QUANTIZE = {
    "class_path": "QuantizationAwareTraining",
    "init_args": {"start_step": 6, "observe_steps": 1, "learn_scales": True},
}
_AVERAGE = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
_LATER_ANSWERS = {"start": 3, "share": 0.5, "tokens": 4}
_OWN_ANSWERS = {"start": 2, "share": 0.7, "adaptive": 0.4, "tolerance": -1e9, "tokens": 4, "replay_size": 8}
RECIPES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "averaged": ("SFT", {}, [_AVERAGE, _JUDGE]),
    "adapters": ("SFT", {}, [{"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.1}}, _JUDGE]),
    "own answers": ("Distillation", {"on_policy": _OWN_ANSWERS}, [_JUDGE]),
    "pruned and quantized": ("Distillation", {"on_policy": _LATER_ANSWERS}, [_PRUNE, _JUDGE, _QUANTIZE]),
}


def main() -> None:
    """Run the command; exits with 1 if anything was lost or differs."""
    options = parser(__doc__, repetitions=None)
    options.add_argument("--kills", type=int, default=300, help="over all recipes (default: %(default)s)")
    arguments = options.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder, Bar(total=arguments.kills, desc="Kills", unit="kills") as bar:
        os.chdir(folder)
        _in_a_process(_make_places, Path("places.log"))
        for number, name in enumerate(RECIPES):
            share = (arguments.kills + number) // len(RECIPES)
            results.append(_recipe(name, share, random.Random(f"0 {name}"), bar.update))
    kills, chains = (sum(row[key] for row in results) for key in ("kills", "chains"))
    ratios = {
        "lost": sum(row["lost"] for row in results) / max(kills, 1),
        "different": sum(row["different"] for row in results) / max(chains, 1),
    }
    report(results, ratios, PACKAGES, arguments.json)
    if any(ratios.values()):
        sys.exit(1)


def _make_places() -> int:
    tokenizer = load_tokenizer(TOKENIZER)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True}
    for seed, place in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **tokens)).save_pretrained(place)
        tokenizer.save_pretrained(place)
    rows = [{"prompt": f"{n} plus {n}?", "response": f"It is {2 * n}"} for n in range(60)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


def _settings(name: str) -> dict[str, Any]:
    module, settings, callbacks = RECIPES[name]
    student = {"student": "student", "generate_tokens": 0, "warmup_steps": 2}
    data = {"train": "data.jsonl", "batch_size": 2, "val_fraction": 0.2, "seed": 3}
    teacher = {"teacher": "teacher"} if module == "Distillation" else {}
    return {
        "seed_everything": 1,
        "trainer": {
            **{"accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1, "num_sanity_val_steps": 0},
            **{"max_steps": STEPS, "accumulate_grad_batches": MICRO_BATCHES, "callbacks": callbacks},
            **{"val_check_interval": 3 * MICRO_BATCHES, "check_val_every_n_epoch": None},
        },
        "model": {"class_path": module, "init_args": {**student, **teacher, **settings}},
        "data": {"class_path": "Conversations", "init_args": data},
        "checkpoint": {"every_n_steps": 1},
    }


def _recipe(name: str, kills: int, moments: random.Random, on_kill: Callable[[], Any]) -> dict[str, Any]:
    """Chains of runs, each killed and resumed until one ends, until there were so many kills; the last chain goes on to its end."""
    recipe = Path(f"{name.replace(' ', '-')}.yaml")
    recipe.write_text(yaml.safe_dump(_settings(name)))
    started = time.monotonic()
    _in_a_process(partial(_train, recipe, Path("whole"), None), Path("whole.log"))
    seconds = time.monotonic() - started
    expected = _outcome([Path("whole")])
    shutil.rmtree("whole")
    row: dict[str, Any] = {"name": name, "kills": 0, "chains": 0, "lost": 0, "different": 0, "seconds": seconds}
    while row["kills"] < kills:
        runs, step, newest, ended = list[Path](), 0, None, False
        while not ended:
            runs.append(Path(f"run-{len(runs)}"))
            moment = moments.uniform(0, 1.1 * seconds) if row["kills"] < kills else None
            ended = _in_a_process(partial(_train, recipe, runs[-1], newest), Path("killed.log"), moment)
            if not ended:
                row["kills"] += 1
                on_kill()
                found, path = _newest(runs)
                row["lost"] += found < step
                step, newest = found, path
        row["chains"] += 1
        if place := _difference(_outcome(runs), expected):
            row["different"] += 1
            print(f"{name}, chain {row['chains']}: different at {place}", file=sys.stderr)
        for run in runs:
            shutil.rmtree(run, ignore_errors=True)
    return row


def _train(recipe: Path, folder: Path, checkpoint: Path | None) -> int:
    torch.set_num_threads(1)
    sys.argv[1:] = []
    resume = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
    return train.entry_point(["fit", "--config", str(recipe), "--run_dir", str(folder), *resume])


def _in_a_process(run: Callable[[], int], log: Path, seconds: float | None = None) -> bool:
    """Whether a fork of this process ended well before it was killed, after so many seconds; one that fails by itself ends the benchmark."""
    child = os.fork()
    if not child:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            status = run()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                code = os.waitstatus_to_exitcode(status)
                sys.exit(f"error: expected a run that ends well, found exit {code}:\n{log.read_text()}")
            return True
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.005)


def _newest(runs: list[Path]) -> tuple[int, Path | None]:
    """Step and place of the newest checkpoint; one that can't be read is none."""
    for run in reversed(runs):
        path = run / "checkpoints/last.ckpt"
        if path.exists():
            try:
                return int(read_checkpoint(path)["global_step"]), path
            except ValueError as error:
                print(f"{path}: {error}", file=sys.stderr)
                return -1, None
    return 0, None


def _outcome(runs: list[Path]) -> dict[str, Any]:
    """What a chain of runs left: the last checkpoint, without places and times, and every metric of a validation by step."""
    checkpoint = read_checkpoint(runs[-1] / "checkpoints/last.ckpt")
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "edits", "on_policy")
    outcome = {name: checkpoint.get(name) for name in kept}
    outcome["callbacks"] = {
        name: state for name, state in checkpoint["callbacks"].items() if not name.startswith(_OF_PLACES)
    }
    metrics: dict[tuple[str, str], str] = {}
    for run in runs:
        file = run / "metrics.csv"
        for row in csv.DictReader(file.open()) if file.exists() else ():
            metrics |= {(row["step"], name): value for name, value in row.items() if _METRIC.match(name) and value}
    return outcome | {"metrics": metrics}


def _difference(ours: Any, theirs: Any, place: str = "") -> str | None:
    """Where two outcomes first differ, through dicts and lists, bit for bit; what a killed run had not yet written of its metrics is none."""
    if isinstance(theirs, dict):
        if place == ".metrics":
            theirs = {key: value for key, value in theirs.items() if key in ours}
        if ours.keys() != theirs.keys():
            return f"{place} (names: {sorted(map(str, ours.keys() ^ theirs.keys()))[:3]})"
        parts = [(ours[key], theirs[key], f"{place}.{key}") for key in theirs]
    elif isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return f"{place} (length)"
        parts = [(mine, other, f"{place}.{at}") for at, (mine, other) in enumerate(zip(ours, theirs, strict=True))]
    else:
        same = torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs
        return None if same else place
    return next((found for part in parts if (found := _difference(*part)) is not None), None)


if __name__ == "__main__":
    sys.exit(as_command(main)())
