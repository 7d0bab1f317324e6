import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import distillation_step
from benchmarks.workers import Worker


def test_our_side_takes_whole_steps(student_folder: str, tmp_path: Path) -> None:
    """The real trainer in its own process: every answer has full length, and memory and time were measured."""
    distillation_step.prepare(tmp_path, student_folder, None)
    arguments = Namespace(repetitions=2, new_tokens=3)
    (row,) = distillation_step.measure(tmp_path, 2, ["potstill"], arguments)
    assert (row["name"], row["batch"], row["new_tokens"]) == ("potstill", 2, 3)
    assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] < 60
    assert row["tokens_per_second"] == pytest.approx(6 / row["median_s"])
    assert row["cpu_s"] > 0
    assert 0.05 < row["peak_memory_gb"] < 8


def test_the_student_has_evenly_spread_layers_and_no_end_token(student_folder: str, tmp_path: Path) -> None:
    distillation_step.prepare(tmp_path, student_folder, 1)
    teacher, student = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("teacher", "student"))
    assert (len(teacher.model.layers), len(student.model.layers)) == (2, 1)
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight)
    assert (student.config.eos_token_id, student.generation_config.eos_token_id) == (None, None)
    assert teacher.config.eos_token_id == 1


def test_a_step_on_other_tokens_is_refused(
    student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 1, "tokens": 5, "threads": 1}
    monkeypatch.setattr(distillation_step, "take_turns", lambda *_, **__: {"potstill": [row]})
    monkeypatch.setattr(distillation_step, "Worker", lambda *_: Namespace(close=lambda: None))
    distillation_step.prepare(tmp_path, student_folder, None)
    with pytest.raises(ValueError, match="expected 6 completion tokens in every step of potstill, found"):
        distillation_step.measure(tmp_path, 2, ["potstill"], Namespace(repetitions=1, new_tokens=3))


def test_a_worker_that_fails_says_why() -> None:
    worker = Worker("benchmarks.distillation_step:potstill", {"folder": "/nowhere", "batch": 1})
    try:
        with pytest.raises(RuntimeError, match="missing 2 required positional arguments: 'new_tokens' and 'steps'"):
            worker.step()
    finally:
        worker.close()


def test_the_benchmark_writes_what_scripts_read(
    student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    target = tmp_path / "out.json"
    arguments = ["--teacher", student_folder, "--batches", "2", "--new-tokens", "3", "--repetitions", "1"]
    monkeypatch.setattr(sys, "argv", ["distillation_step", *arguments, "--json", str(target)])
    distillation_step.main()
    written = json.loads(target.read_text())
    ours, theirs = written["results"]
    assert (ours["name"], theirs["name"]) == ("potstill", "trl")
    assert written["ratios"] == {
        "tokens_per_second_batch2": pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"]),
        "peak_memory_batch2": pytest.approx(ours["peak_memory_gb"] / theirs["peak_memory_gb"]),
    }
    assert written["versions"]["trl"]
