"""The quickstart's figures: README and file say the same, a report goes into both, and one that does not fit is found."""

import copy
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import quickstart
from tests.helpers.short_runs import ROOT


def _report() -> dict:
    """What a run would have found, rounded."""
    served = [
        {"name": "teacher", "kl": 0.001, "task_score": 0.80},
        {"name": "student", "kl": 0.080, "task_score": 0.78},
        {"name": "student_cpu", "kl": 0.090, "task_score": 0.77},
    ]
    for row in served:
        row |= {f"{name}_{end}": row[name] for name in ("kl", "task_score") for end in ("low", "high")}
        row |= {"questions": 192, "tokens": 1500}
    speeds = {"teacher": (538e6, 1000, 30), "student": (190e6, 1000, 40), "student_cpu": (130e6, 300, 120)}
    benchmark = [
        {
            "name": name,
            "bytes": size,
            "time_to_first_token_ms": first,
            "tokens_per_second": speed,
            "prompt_tokens": 512,
            "new_tokens": 32,
            "repetitions": 5,
        }
        for name, (size, first, speed) in speeds.items()
    ]
    return {
        "constant_answer_score": 0.1,
        "teacher": {"name": "teacher", "parameters": 134_515_008},
        "phases": [{"name": "quantized", "parameters": 114_000_000}],
        "served": served,
        "benchmark": benchmark,
        "artefacts": [{"path": "onnx/cpu.onnx", "kind": "ONNX int8", "bytes": 130e6}],
        "versions": {"torch": "2.13.0"},
        "minutes": 7.0,
        "peak_memory_bytes": 5e9,
    }


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean checkout with a README and a finished run."""
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"Before\n{quickstart.BEGIN}\nold\n{quickstart.END}\nBehind\n")
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "runs/quickstart/teacher").mkdir(parents=True)
    (tmp_path / "runs/quickstart/report.json").write_text(json.dumps(_report()))
    (tmp_path / "runs/quickstart/teacher/report.json").write_text(json.dumps({"minutes": 3.0}))
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_readme_and_file_say_the_same() -> None:
    figures = json.loads((ROOT / quickstart.FIGURES).read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert quickstart.with_table(readme, figures) == readme, (
        "run `python -m benchmarks.quickstart runs/quickstart/report.json`"
    )
    assert not list(quickstart.differences(figures, figures))


def test_one_command_copies_a_run(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = str(checkout / "runs/quickstart/report.json")
    assert quickstart.main([report, "--install-minutes", "1.5"], checkout) == 0
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("Before\n") and readme.endswith("Behind\n") and "old" not in readme
    assert "| student, INT8 graph for CPUs | 114,000,000 | 130 | 0.090 | 0.770 (0.770 to 0.770) | 300 | 120 |" in readme
    assert "decodes 4.0 times as fast" in readme and "12 minutes, 1.5 of them for installing" in readme
    assert (checkout / quickstart.PICTURE).stat().st_size > 1000
    figures = json.loads((checkout / quickstart.FIGURES).read_text())
    assert len(figures["commit"]) == 40 and figures["machine"]["cores"]
    assert figures["gain"]["student_cpu"] == pytest.approx(0.67 / 0.7)
    assert quickstart.main([report, "--check"], checkout) == 0
    assert quickstart.main([report], checkout) == 2  # README is not what was committed
    assert "expected a checkout without changes, found README.md changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("served", 1, "task_score"), 0.6, "task_score of student of 0.780 within 0.12, found 0.600"),
        (("served", 0, "kl"), 0.06, "kl of teacher of 0.001 within 0.05"),
        (
            ("benchmark", 2, "tokens_per_second"),
            50,
            "decode of student_cpu, times as fast as the teacher's of at least 2.00",
        ),
        (("benchmark", 2, "time_to_first_token_ms"), 700, "first_token of student_cpu"),
        (("benchmark", 2, "bytes"), 190e6, "size of student_cpu"),
    ],
)
def test_a_report_that_does_not_hold_is_found(where: tuple, value: float, message: str) -> None:
    stated = quickstart.figures_of(_report(), {})
    report = copy.deepcopy(_report())
    report[where[0]][where[1]][where[2]] = value
    found = list(quickstart.differences(quickstart.figures_of(report, {}), stated))
    assert [sentence for sentence in found if message in sentence], found


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected <!-- quickstart-results --> and"):
        quickstart.with_table("nothing", quickstart.figures_of(_report(), {}))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("served", 2, "kl"), 0.125, "kl of student_cpu of at most 0.12"),
        (("served", 2, "task_score"), 0.69, "teacher's gain that student_cpu keeps of at least 0.85, found 0.843"),
        (
            ("benchmark", 2, "tokens_per_second"),
            72,
            "decode of student_cpu, times as fast as the teacher's of at least 2.5",
        ),
        (("benchmark", 2, "time_to_first_token_ms"), 520, "first_token of student_cpu"),
        (("benchmark", 2, "bytes"), 190e6, "size of student_cpu"),
    ],
)
def test_a_missed_aim_is_said(where: tuple, value: float, message: str) -> None:
    assert not list(quickstart.missed_aims(quickstart.figures_of(_report(), {})))
    report = copy.deepcopy(_report())
    report[where[0]][where[1]][where[2]] = value
    found = list(quickstart.missed_aims(quickstart.figures_of(report, {})))
    assert [sentence for sentence in found if message in sentence], found
