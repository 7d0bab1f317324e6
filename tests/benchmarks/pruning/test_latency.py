"""The benchmark's command; what it measures is stubbed, for the search needs models whose time follows their size."""

import json
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from benchmarks.pruning import latency as pruned_latency
from models.pruning.budget.latency import Latency, Met, Run, torch_run


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_the_benchmark_writes_what_scripts_read(
    backend: str, student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, int]] = []
    prepared: list[tuple[int, int]] = []

    def backend_run(model: PreTrainedModel, *, batch: int, length: int) -> Run:
        prepared.append((batch, length))
        return torch_run(model, batch=batch, length=length)

    def meet(dense, shrink, ratio, *, prepare, repetitions) -> Met:
        asked.append((ratio, repetitions))
        assert shrink(0.0) == dense
        prepare(shrink(1.0))()
        return Met(shrink(1.0), 0.6, Latency(1.0, 0.79, 0.79, (0.7, 0.9)), {1.0: 0.4, 0.6: 0.81})

    def compare(dense: Run, student: Run, *, repetitions: int) -> Latency:
        dense()
        student()
        return Latency(1.0, 0.82, 0.83, (0.8, 0.85))

    target = tmp_path / "out.json"
    monkeypatch.setitem(pruned_latency.BACKENDS, backend, backend_run)
    monkeypatch.setattr(pruned_latency, "meet_latency", meet)
    monkeypatch.setattr(pruned_latency, "compare", compare)
    options = [
        "--model",
        student_folder,
        "--backend",
        backend,
        "--multiple",
        "16",
        "--repetitions",
        "4",
        "--length",
        "7",
    ]
    monkeypatch.setattr(sys, "argv", ["pruned_latency", *options, "--json", str(target)])
    pruned_latency.main()
    assert asked == [(0.8, 4)]
    assert prepared == [(1, 7)] * 3  # for the search, then both anew
    written = json.loads(target.read_text())
    assert written["ratios"] == {
        "asked": 0.8,
        "student_time_over_dense": 0.83,
        "student_time_over_dense_in_search": 0.79,
    }
    dense, student = written["results"]
    assert (dense["neurons"], dense["kv_groups"], dense["median_s"]) == (48, 2, 1.0)
    assert (student["neurons"], student["kv_groups"], student["median_s"]) == (16, 1, 0.82)
    assert (student["ratio_lower_quartile"], student["ratio_upper_quartile"]) == (0.8, 0.85)
    assert student["parameters"] < dense["parameters"]
    assert student["gflops"] < dense["gflops"]
