"""Every recipe in `configs/` runs with its own callbacks, with fewer steps on tiny models, alone and under the W&B overlay."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import train
from models.loading.checkpoint import load_student_checkpoint
from tests.helpers.short_runs import MOVED, ROOT, STEPS, short
from tests.helpers.tiny import tiny_folder, tiny_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "configs").symlink_to(ROOT / "configs")
    tiny_folder(folder / "student", seed=1)
    tiny_folder(folder / "teacher", seed=2)
    tiny_jsonl(folder / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(24)])
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def arguments(name: str, *more: str) -> list[str]:
    """A recipe cut short by an overlay that moves its callbacks' steps."""
    moved = {**MOVED, "ExportOnFitEnd": {**MOVED["ExportOnFitEnd"], "formats": ["hf"]}} if name == "sft" else MOVED
    overlay = short(name, moved)
    overlay["model"]["init_args"] |= {"student": "student"} | ({} if name == "sft" else {"teacher": "teacher"})
    overlay["data"] = {"init_args": {"train": "my.jsonl", "batch_size": 4, "max_length": 64, "val_fraction": 0.2}}
    Path(f"{name}-short.yaml").write_text(yaml.safe_dump(overlay))
    files = ["--config", f"configs/{name}.yaml", "--config", f"{name}-short.yaml"]
    return ["fit", *files, *more]


def run(name: str, *more: str) -> train.PotstillCLI:
    """Run a shortened recipe in this process."""
    return train.main(arguments(name, *more))


@pytest.mark.long
@pytest.mark.recipe
@pytest.mark.parametrize("name", ["sft", "distill", "compress"])
def test_a_recipe_runs_with_its_own_callbacks(name: str) -> None:
    cli = run(name)
    folder = cli.run_dir
    assert cli.trainer.global_step == STEPS
    named = [
        c["class_path"] for c in yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["trainer"]["callbacks"]
    ]
    assert set(named) <= {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert {"config.yaml", "metrics.csv", "samples.jsonl", "checkpoints", "student", "report.json", "report.md"} <= set(
        os.listdir(folder)
    )
    student = AutoModelForCausalLM.from_pretrained(folder / "student", trust_remote_code=False)
    report = json.loads((folder / "report.json").read_text())
    checks = [check["status"] for check in report["verification"]]
    if name == "sft":
        assert checks == []
    else:
        assert set(checks) == {"passed"}
        assert (folder / "onnx/model.onnx").is_file()
    if name == "compress":
        assert student.config.intermediate_size == 32  # 48 less a quarter, rounded to a multiple of 8
        assert [phase["name"] for phase in report["phases"]] == ["pruned", "recovered", "quantized"]
        assert report["phases"][-1]["parameters"] == student.num_parameters()
    else:
        assert student.config.intermediate_size == 48


@pytest.mark.long
@pytest.mark.recipe
@pytest.mark.parametrize(
    "overlays",
    [["adam8bit"], ["checkpointing", "lora"], ["checkpointing", "bf16_weights", "teacher_int8"]],
    ids="+".join,
)
def test_a_recipe_runs_under_the_memory_overlays(overlays: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Together as far as they combine, through the student's own answers to a verified export, and on from a checkpoint."""
    pytest.importorskip("torchao")
    pytest.importorskip("peft")
    files = [argument for name in overlays for argument in ("--config", f"configs/{name}.yaml")]
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its update once for every shape, seconds each
        cli = run("distill", *files)
        assert cli.trainer.global_step == STEPS
        report = json.loads((cli.run_dir / "report.json").read_text())
        assert {check["status"] for check in report["verification"]} == {"passed"}
        student = AutoModelForCausalLM.from_pretrained(cli.run_dir / "student", trust_remote_code=False)
        assert student.config.intermediate_size == 48
        more = ["--ckpt_path", str(cli.run_dir / "checkpoints/last.ckpt"), "--trainer.max_steps", str(STEPS + 1)]
        monkeypatch.setitem(MOVED, "ExportOnFitEnd", {"formats": ["hf"]})  # its graph is that of the first run
        assert run("distill", *files, *more).trainer.global_step == STEPS + 1


@pytest.mark.long
@pytest.mark.recipe
def test_the_fsdp_overlay_runs_on_two_processes_and_exports() -> None:
    command = [sys.executable, str(ROOT / "train.py"), *arguments("distill", "--config", "configs/fsdp.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--trainer.accelerator", "cpu", "--name", "sharded"], check=True, env=environment)
    student, _ = load_student_checkpoint(Path("runs/sharded-001/checkpoints/last.ckpt"))
    assert student.config.intermediate_size == 48


@pytest.mark.long
@pytest.mark.recipe
def test_the_wandb_overlay_logs_offline_into_the_runs_folder(place: Path) -> None:
    """Configuration, metrics, the table of samples and the report; a second run is not refused."""
    before = set(os.listdir(place))
    command = [sys.executable, str(ROOT / "train.py")]
    command += arguments("sft", "--config", "configs/wandb.yaml", "--name", "logged")
    # Not the W&B service that an earlier test may have started here: it would write on after the run has ended.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_SERVICE")}
    environment["PYTHONPATH"] = str(ROOT)
    for _ in range(2):  # each in a process of its own, as W&B expects: its service outlives a run
        subprocess.run(command, check=True, env=environment, capture_output=True)
    folders = sorted((place / "runs").glob("logged-*"))
    assert [folder.name for folder in folders] == ["logged-001", "logged-002"]
    for folder in folders:
        (offline,) = (folder / "wandb").glob("offline-run-*")
        log = next(offline.glob("*.wandb"))
        parts = (b"warmup_steps", b"val/perplexity", b"throughput/tokens_per_second")
        deadline = time.monotonic() + 60
        while not all(part in log.read_bytes() for part in parts) and time.monotonic() < deadline:
            time.sleep(0.2)  # W&B's own process flushes the file
        assert [part for part in parts if part not in log.read_bytes()] == []
        tables = [json.loads(path.read_text()) for path in sorted(offline.glob("files/media/table/samples*.json"))]
        assert len(tables) == STEPS // 3
        assert all(table["columns"] == ["step", "prompt", "completion", "answer"] for table in tables)
        assert {row[0] for table in tables for row in table["data"]} == {3, 6}
        assert {path.name for path in (offline / "files").glob("report.*")} == {"report.json", "report.md"}
        assert (folder / "metrics.csv").read_text().count("\n") > STEPS
    assert set(os.listdir(place)) - before <= {"runs", "sft-short.yaml"}, "nothing outside the runs' folders"


def test_every_file_in_configs_is_tested_somewhere() -> None:
    """A new recipe needs a run: here, or for the quickstart's two parts in `test_train.py`."""
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert names == {"sft", "distill", "compress", "wandb", "quickstart", "quickstart_teacher"} | {
        "checkpointing",
        "adam8bit",
        "bf16_weights",
        "lora",
        "teacher_int8",
        "fsdp",
        "ranking",  # in test_ranking_recipes.py
        "ranking_teacher",
    }
    quickstart = (ROOT / "tests/test_train.py").read_text()
    assert "configs/quickstart.yaml" in quickstart and "configs/quickstart_teacher.yaml" in quickstart
