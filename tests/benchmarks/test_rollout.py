import json
import sys
from pathlib import Path

import pytest

from benchmarks import rollout
from benchmarks.harness import spread


def test_the_benchmark_writes_what_scripts_read(
    student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.json"
    arguments = ["--model", student_folder, "--new-tokens", "3", "--repetitions", "1", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["rollout", *arguments])
    rollout.main()
    written = json.loads(target.read_text())
    assert set(written) == {"results", "ratios", "versions"}
    assert [(row["name"], row["batch"]) for row in written["results"]] == [
        ("potstill", 4),
        ("transformers", 4),
        ("potstill", 16),
        ("transformers", 16),
    ]
    first, second = (row["tokens_per_second"] for row in written["results"][:2])
    assert written["ratios"]["tokens_per_second_batch4"] == pytest.approx(first / second)


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median_s": 2.0, "min_s": 1.0, "max_s": 3.0}
