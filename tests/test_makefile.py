"""`make quickstart` starts over: what an earlier one wrote goes, nothing else does."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_new_quickstart_removes_what_the_old_one_wrote_and_nothing_else(tmp_path: Path) -> None:
    for name in ("student/model.safetensors", "onnx/model.onnx", "engine/x.engine", "teacher/student/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    for name in ("report.json", "report.md", "config.yaml", "notes.txt"):
        (tmp_path / name).write_text("old")
    subprocess.run(["make", "clean-quickstart", f"OUT={tmp_path}"], cwd=ROOT, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_first_quickstart_has_nothing_to_remove(tmp_path: Path) -> None:
    subprocess.run(["make", "clean-quickstart", f"OUT={tmp_path / 'new'}"], cwd=ROOT, check=True)
    assert list(tmp_path.iterdir()) == []
