import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from export.plots import plot_training
from export.report import closing, markdown, read_metrics, write_report

PHASES = [
    {"name": "pruned", "step": 4, "parameters": 900, "kl": 0.5, "top1_agreement": 0.8, "task_score": 0.25},
    {"name": "quantized", "step": 9, "parameters": 900, "kl": 0.125, "top1_agreement": 0.9, "task_score": 0.5},
]
PRUNING = [
    {
        "event": 1, "step": 2, "kl_before": 0.0625, "kl_after_cut": 2.5, "kl_after_repair": 0.75, "kl_recovered": 0.5,
        "parameters": 1950, "layers": 3, "hidden_size": 32, "neurons_per_layer": 40,
    },
    {
        "event": 2, "step": 4, "kl_before": 0.25, "kl_after_cut": 1.5, "kl_after_repair": 3.5, "repair_undone": 1.0,
        "kl_recovered": -0.125, "parameters": 900, "layers": 3, "hidden_size": 32, "neurons_per_layer": 32,
    },
]  # fmt: skip
SERVED = [
    {"name": name, "kl": kl, "kl_low": kl / 2, "kl_high": 2 * kl, "task_score": 0.75, "task_score_low": 0.5, "task_score_high": 1.0,
     "tokens": 99, "questions": 12} for name, kl in (("teacher", 0.0), ("student", 0.125), ("student_cpu", 0.25))
]  # fmt: skip
REPORT = {
    "teacher": {"name": "teacher", "parameters": 1000, "kl": 0.0, "top1_agreement": 1.0, "task_score": 0.75},
    "phases": PHASES,
    "constant_answer_score": 0.1,
    "pruning": PRUNING,
    "artefacts": [{"path": "onnx/model.onnx", "bytes": 2_000_000, "kind": "ONNX fp8"}],
    "benchmark": [
        {
            "name": "student",
            "path": "onnx/model.onnx",
            "bytes": 2_000_000,
            "prompt_tokens": 128,
            "new_tokens": 32,
            "repetitions": 5,
            "tokens_per_second": 50.0,
            "tokens_per_second_min": 40.0,
            "tokens_per_second_max": 60.0,
            "time_to_first_token_ms": 12.5,
            "time_to_first_token_ms_min": 12.0,
            "time_to_first_token_ms_max": 13.0,
        }
    ],
    "verification": [
        {"name": "engine", "status": "not_run", "reason": "no GPU"},
        {"name": "onnx", "status": "passed", "rounding_ratio": 0.5, "bound": 4.0, "greedy_agreement": 1.0},
    ],
    "versions": {"torch": "2.13"},
}


def test_report_holds_the_figures_and_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/loss,pruning/parameters,val/kl\n0,0,1.5,1000,\n0,4,1.25,900,\n0,9,1.0,,0.2\n"
    )
    write_report(tmp_path, REPORT)
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT
    text = (tmp_path / "report.md").read_text()
    for figure in (
        "| teacher | 1,000 | 0 | 1 | 0.75 |",
        "| pruned | 900 | 0.5 | 0.8 | 0.25 |",
        "| 2 | 1,950 | 0.0625 | 2.5 | 0.75 | 0.5 |",
        "0.100",
        "no GPU",
        "| 0.5 |",
        "50.0 (40.0 to 60.0)",
    ):
        assert figure in text, figure
    for picture in ("plots/training.png", "plots/artefacts.png"):
        assert f"({picture})" in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "plots", "report.json", "report.md"]


def test_an_export_without_training_has_no_table_of_phases(tmp_path: Path) -> None:
    report = {key: REPORT[key] for key in ("artefacts", "verification", "benchmark", "versions")}
    write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    assert "Quality" not in text
    assert "Pruning" not in text
    assert not (tmp_path / "plots/training.png").exists()


def test_phases_without_a_teacher_have_dashes_and_still_a_plot(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,0,1.5\n0,4,1.25\n")
    phases = [{"name": "trained", "step": 4, "parameters": 1000, "perplexity": 3.0}]
    write_report(tmp_path, {"phases": phases, "teacher": {}, "constant_answer_score": None})
    assert "| trained | 1,000 | - | - | - |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "plots/training.png").exists()


def test_pruning_events_in_words() -> None:
    """An undone repair is called so, what only some events have is a dash elsewhere, and a loss is not called KL."""
    lines = markdown(REPORT, []).splitlines()
    row = lines.index("| 4 | 900 | 0.25 | 1.5 | 3.5 (undone) | -0.125 |")
    assert lines[row - 2] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[row + 2].startswith("KL to the teacher in nats per token")
    last = {"event": 1, "step": 2, "loss_before": 1.5, "loss_after_cut": 2.5, "parameters": 900}
    text = markdown({"pruning": [last]}, [])
    assert "| 2 | 900 | 1.5 | 2.5 | - | - |" in text
    assert "Cross-entropy in nats" in text
    unjudged = markdown({"pruning": [{"event": 1, "step": 2, "parameters": 900}]}, [])
    assert "| 2 | 900 | - | - | - | - |" in unjudged


def test_pruning_events_are_marked_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: dict[str, Any] = {}

    def note(figure: Figure, *_: Any, **__: Any) -> None:
        marks.update({dots.get_label(): dots.get_offsets().tolist() for dots in figure.axes[0].collections})

    monkeypatch.setattr(Figure, "savefig", note)
    plot_training({"train/loss": [(0, 1.5), (9, 1.0)]}, [], PRUNING, tmp_path)
    assert marks == {"KL after a cut": [[2, 2.5], [4, 1.5]], "KL after a repair": [[2, 0.75], [4, 3.5]]}
    assert not plt.get_fignums()


def test_metrics_are_columns_of_step_and_value(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,a,b\n0,1,0.5,\n0,2,,4\n0,3,1.5,\n")
    assert read_metrics(tmp_path / "metrics.csv") == {"a": [(1, 0.5), (3, 1.5)], "b": [(2, 4.0)]}
    assert read_metrics(tmp_path / "missing.csv") == {}


def test_what_could_not_be_measured_says_why() -> None:
    missing = [{"name": "student_cpu", "reason": "expected 9 GB, found 1"}]
    assert "\n\nNot measured: student_cpu: expected 9 GB, found 1" in markdown(REPORT | {"not_measured": missing}, [])
    alone = markdown({"not_measured": missing}, [])
    assert "## Speed in ONNX Runtime on this machine's CPU\n\nNot measured: student_cpu" in alone


def test_markdown_aligns_numbers() -> None:
    header = markdown(REPORT, []).splitlines()
    assert header[header.index("| teacher | 1,000 | 0 | 1 | 0.75 |") - 1] == "| --- | ---: | ---: | ---: | ---: |"


def test_the_last_lines_say_what_was_made_how_good_how_fast_where_and_what_comes_next() -> None:
    row = REPORT["benchmark"][0]
    rows = [
        row | {"name": "teacher", "bytes": 8_000_000},
        row,
        row | {"name": "student_cpu", "tokens_per_second": 200.0},
    ]
    made = [*REPORT["artefacts"], {"path": "compressed", "bytes": 3_000_000, "kind": "compressed-tensors folder int8"}]
    lines = closing(REPORT | {"served": SERVED, "benchmark": rows, "artefacts": made}, Path("runs/one")).splitlines()
    assert lines[0] == "Made:   onnx/model.onnx (ONNX fp8, 2 MB)"
    assert "teacher: task score 0.750 (0.500 to 1.000), KL to the teacher 0.000" in lines[2]
    assert "student_cpu" in lines[4] and "0.250 (0.125 to 0.500) nats a token" in lines[4]
    assert "task score 0.100" in lines[5]
    assert "1.0 times as fast to the first token, 4.0 times as fast after it, 0.25 of the size" in lines[8]
    assert lines[9].startswith("Where:  runs/one/")
    assert lines[10].endswith("-m export.chat runs/one") and lines[11].endswith("vllm serve runs/one/compressed")


def test_the_last_lines_of_a_run_that_made_a_folder_only() -> None:
    made = [{"path": "student", "bytes": 3_000_000, "kind": "Hugging Face folder"}]
    text = closing({"artefacts": made}, Path("runs/one"))
    assert text.splitlines()[0] == "Made:   student (Hugging Face folder, 3 MB)"
    assert "Good" not in text and "Fast" not in text and "Next" not in text
