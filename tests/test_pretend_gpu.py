"""Every recipe on a machine with a GPU that is not there: preflight, steps, events, validation and the tracing of its export.

`tests/helpers/pretend_gpu.py` says what such a run shows, and what it cannot.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train
from tests.helpers.pretend_gpu import PretendGpu, pretend_gpu
from tests.helpers.short_runs import MOVED, ROOT, STEPS, short
from tests.helpers.tiny import tiny_folder, tiny_jsonl
from tests.helpers.tiny_movielens import SETTINGS as FILMS
from tests.helpers.tiny_movielens import tiny_movielens

CHAT = {"train": "my.jsonl", "batch_size": 4, "max_length": 64, "val_fraction": 0.2}
TASKS = {"train_size": 32, "val_size": 4, "test_size": 4, "batch_size": 4, "eval_batch_size": 4}
QUICK = {"served_questions": 0, "cpu": False, "benchmark_repetitions": 0, "verify_prompts": 1, "formats": ["hf", "onnx"]}
DATA = {"quickstart": TASKS, "quickstart_teacher": TASKS, "ranking": FILMS, "ranking_teacher": FILMS}
RECIPES = ["sft", "distill", "compress", "quickstart_teacher", "quickstart", "ranking_teacher", "ranking"]
OVERLAYS = [["checkpointing"], ["lora"], ["adam8bit"], ["bf16_weights", "teacher_int8"], ["wandb"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "configs").symlink_to(ROOT / "configs")
    for seed, name in enumerate(("student", "teacher")):
        tiny_folder(folder / name, seed=seed, head_dim=16, max_position_embeddings=1024)
    tiny_jsonl(folder / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(24)])
    tiny_movielens(folder / "films")
    return folder


@pytest.fixture
def gpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pretend_gpu() as gpu:
        yield gpu


def arguments(name: str, overlays: list[str] = [], **trainer: Any) -> list[str]:  # noqa: B006
    """A recipe with tiny models and a few steps; which device it takes, it finds out by itself."""
    export = MOVED["ExportOnFitEnd"] | (QUICK if name == "quickstart" else {})
    overlay = short(name, {**MOVED, "ExportOnFitEnd": export})
    overlay["trainer"] |= {"limit_val_batches": 1, "num_sanity_val_steps": 0, **trainer}
    has_teacher = "teacher" in yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["model"]["init_args"]
    overlay["model"]["init_args"] |= {"student": "student"} | ({"teacher": "teacher"} if has_teacher else {})
    overlay["data"] = {"init_args": DATA.get(name, CHAT)}
    if name.startswith("ranking"):
        del overlay["model"]["init_args"]["generate_tokens"]
    Path("short.yaml").write_text(yaml.safe_dump(overlay))
    files = [f"configs/{name}.yaml", "short.yaml", *(f"configs/{overlay}.yaml" for overlay in overlays)]
    return ["fit", *(argument for file in files for argument in ("--config", file))]


@pytest.mark.pretend_gpu
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_a_gpu(gpu: PretendGpu, name: str) -> None:
    cli = train.main(arguments(name))
    assert cli.trainer.strategy.root_device == torch.device("cuda", 0)
    assert cli.trainer.global_step == STEPS


@pytest.mark.pretend_gpu
@pytest.mark.parametrize("overlays", OVERLAYS, ids="+".join)
def test_a_recipe_runs_on_a_gpu_under_the_overlays(gpu: PretendGpu, overlays: list[str]) -> None:
    with torch.compiler.set_stance("force_eager"):
        assert train.main(arguments("distill", overlays)).trainer.global_step == STEPS
