import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import memory

pytestmark = pytest.mark.long


def test_each_overlay_alone_and_all_together() -> None:
    files, whole = [Path("a.yaml"), Path("b.yaml")], Path("whole.yaml")
    assert memory.sides(files, whole) == {
        "whole_logits": [whole],
        "a": files[:1],
        "b": files[1:],
        "together": files,
    }
    assert memory.sides(files[:1], whole) == {"whole_logits": [whole], "a": files[:1]}
    for name in memory.OVERLAYS:
        assert (memory.ROOT / f"configs/{name}.yaml").is_file()


def test_measures_real_runs_in_turns(student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of an overlay reach its worker alone: twice the samples in a batch are twice the tokens."""
    overlay, target = tmp_path / "double.yaml", tmp_path / "out.json"
    overlay.write_text(yaml.safe_dump({"data": {"init_args": {"batch_size": 4}}}))
    arguments = ["--model", student_folder, "--batch-size", "2", "--length", "64", "--repetitions", "1"]
    monkeypatch.setattr(sys, "argv", ["memory", str(overlay), *arguments, "--json", str(target)])
    memory.main()
    written = json.loads(target.read_text())
    beside_whole, whole, none, double = written["results"]
    assert [row["name"] for row in written["results"]] == ["none", "whole_logits", "none", "double"]
    assert (none["tokens"], double["tokens"]) == (2 * 64, 4 * 64)
    assert all(row["median_s"] > 0 and row["peak_bytes"] > 2**27 for row in written["results"])
    assert written["ratios"]["memory_whole_logits"] == pytest.approx(whole["peak_bytes"] / beside_whole["peak_bytes"])
    assert written["ratios"]["memory_double"] == pytest.approx(double["peak_bytes"] / none["peak_bytes"])


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    overlay = tmp_path / "nothing.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"init_args": {"student": "nothing", "teacher": "nothing"}}}))
    files = {"nothing": [memory.ROOT / "configs/distill.yaml", overlay]}
    with pytest.raises(RuntimeError, match="expected the worker benchmarks.memory:run to answer[^$]*error: expected"):
        memory.measure(files, tmp_path, 1)


def test_an_overlay_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["memory", str(tmp_path / "none.yaml")])
    with pytest.raises(FileNotFoundError, match="expected an overlay at '.*none.yaml', found none; name a YAML file"):
        memory.main()
