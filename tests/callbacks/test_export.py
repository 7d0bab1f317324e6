"""What the export at the end of `fit` takes over from the callbacks of the training."""

import json
from pathlib import Path

import pytest
from pruning_runs import fit, make_places, pruning

from callbacks import ExportOnFitEnd


def test_the_report_holds_the_events_of_the_pruning(tmp_path: Path) -> None:
    """The last one with its recovery, which is measured when the training ends."""
    callback = pruning(0.5)
    fit(make_places(tmp_path), tmp_path / "run", callback, ExportOnFitEnd("fp32", ["hf"]))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [event["step"] for event in report["pruning"]] == [2, 4]
    assert report["pruning"] == callback.history
    assert "kl_recovered" in report["pruning"][-1]
    assert "## Pruning events" in (tmp_path / "run/report.md").read_text()


def test_the_report_of_a_run_without_pruning(tmp_path: Path) -> None:
    fit(make_places(tmp_path), tmp_path / "run", ExportOnFitEnd("fp32", ["hf"]), trainer_max_steps=1)
    assert json.loads((tmp_path / "run/report.json").read_text())["pruning"] == []
    assert "Pruning" not in (tmp_path / "run/report.md").read_text()


def test_labels_that_are_no_tokens_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected every label as one token"):
        fit(make_places(tmp_path), tmp_path / "run", ExportOnFitEnd("fp32", ["onnx"], labels=["n", "yes"]))
    assert not (tmp_path / "run/metrics.csv").exists()


@pytest.mark.parametrize("further", [{"labels": ["n", "y"]}, {"prefill": True}, {"cpu": True}])
def test_further_graphs_want_a_graph(further: dict) -> None:
    with pytest.raises(ValueError, match=f"expected onnx or engine among formats for {next(iter(further))}"):
        ExportOnFitEnd("fp32", ["hf"], **further)
