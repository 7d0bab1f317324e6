"""`make quickstart` starts over: what an earlier one wrote goes, nothing else does."""

import subprocess
from pathlib import Path

from tests.helpers.short_runs import ROOT


def test_a_new_quickstart_removes_what_the_old_one_wrote_and_nothing_else(tmp_path: Path) -> None:
    killed = (
        ".writing-ab12/onnx/model.onnx.data",
        ".replaced-ab12/config.json",
        "teacher/.writing-ab12/student/config.json",
        "onnx/.writing-ab12/cpu.onnx",
    )
    finished = (
        "student/model.safetensors",
        "compressed/x",
        "onnx/model.onnx",
        "engine/x.engine",
        "teacher/student/config.json",
    )
    for name in (*finished, *killed, "baseline/onnx/model.onnx", "checkpoints/last.ckpt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    for name in ("report.json", "report.md", ".report.json.tmp", "config.yaml", "metrics.csv", "notes.txt"):
        (tmp_path / name).write_text("old")
    subprocess.run(["make", "clean-quickstart", f"OUT={tmp_path}"], cwd=ROOT, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_first_quickstart_has_nothing_to_remove(tmp_path: Path) -> None:
    subprocess.run(["make", "clean-quickstart", f"OUT={tmp_path / 'new'}"], cwd=ROOT, check=True)
    assert list(tmp_path.iterdir()) == []


def test_both_parts_get_the_seed_and_the_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-n", "quickstart", "SEED=7", f"OUT={tmp_path}"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    parts = [
        line for line in done.stdout.replace("\\\n", " ").splitlines() if "train.py fit" in line and "echo" not in line
    ]
    assert len(parts) == 2
    for part in parts:
        assert "--seed_everything 7 --data.init_args.seed 7" in part
    assert f"--run_dir {tmp_path}/teacher" in parts[0]
    assert f"--model.init_args.teacher {tmp_path}/teacher/student" in parts[1]
