"""The study from its command line, with a tiny teacher: all rows, nothing done twice, nothing mixed."""

import json
import statistics
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import trained as study_training
from benchmarks.distillation import __main__ as study_distillation
from benchmarks.study import Rows, write_half
from tests.helpers.study_commands import study_command
from tests.helpers.study_pages import page_beside
from tests.helpers.tiny import tiny_folder

ARMS = list(study_distillation.ARMS)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two steps and two seeds of every arm."""
    folder = tmp_path_factory.mktemp("study")
    teacher = tiny_folder(folder / "teacher", num_hidden_layers=4, hidden_size=16, intermediate_size=16)
    return study_command(folder, teacher, "out", steps=2, train_size=12)


@pytest.fixture(scope="module")
def out(command: list[str]) -> Path:
    path = Path(command[command.index("--out") + 1])
    page_beside(path, "distillation", "distillation")
    study_distillation.main(command)
    return path


def test_every_arm_and_seed_has_a_row(out: Path) -> None:
    names = Rows(out.with_suffix(".jsonl")).all().keys()
    equal_steps = {f"steps-{arm}-{seed}" for arm in ARMS for seed in (1, 2)}
    equal_time = {f"time-{arm}-{seed}" for arm in ("sft", "stage1", "on_policy") for seed in (1, 2)}
    assert names == equal_steps | equal_time | {"teacher", "untrained"}
    teacher = Rows(out.with_suffix(".jsonl")).all()["teacher"]
    assert (teacher["kl"], teacher["top1_agreement"]) == (0, 1)
    assert teacher["own_kl"] == pytest.approx(0, abs=1e-6)


def test_arms_and_seeds_differ_only_where_they_should(out: Path) -> None:
    rows = Rows(out.with_suffix(".jsonl")).all()
    start = rows["untrained"]
    for seed in (1, 2):
        figures = [rows[f"steps-{arm}-{seed}"]["kl"] for arm in ARMS]
        assert len({*figures, start["kl"]}) == len(ARMS) + 1  # all train, each in its own way
    assert all(rows[f"steps-{arm}-1"]["kl"] != rows[f"steps-{arm}-2"]["kl"] for arm in ARMS)
    for row in rows.values():
        if "curve" in row:
            steps = [point["step"] for point in row["curve"]]
            assert len(steps) == min(row["steps"], 4) and steps == sorted(set(steps)) and steps[-1] == row["steps"]
            seconds = [point["seconds"] for point in row["curve"]]
            assert seconds[0] > 0 and seconds == sorted(set(seconds)) and seconds[-1] == row["seconds"]
            assert row["settings"]["steps"] == row["steps"]


def test_equal_time_gets_steps_from_the_first_seed(out: Path) -> None:
    rows = Rows(out.with_suffix(".jsonl")).all()
    for arm in ("sft", "stage1", "on_policy"):
        expected = max(1, round(rows["steps-two_stage-1"]["seconds"] / (rows[f"steps-{arm}-1"]["seconds"] / 2)))
        assert rows[f"time-{arm}-1"]["steps"] == rows[f"time-{arm}-2"]["steps"] == expected


def test_the_page_shows_every_arm_with_its_mean_and_deviation(out: Path, command: list[str]) -> None:
    page = out.with_suffix(".md").read_text()
    for arm in (*ARMS, "teacher", "untrained"):
        assert f"| {arm} |" in page
    values = [Rows(out.with_suffix(".jsonl")).all()[f"steps-sft-{seed}"]["kl"] for seed in (1, 2)]
    assert f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" in page
    for target in ("figures.png", "curves.png"):
        assert f"({out.name}/{target})" in page and (out / target).stat().st_size > 1000
    written = json.loads(Path(command[-1]).read_text())
    assert len(written["results"]) == 2 + 2 * len(ARMS) + 2 * 3


def test_a_second_time_nothing_is_trained(out: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    page = out.with_suffix(".md").read_text()
    monkeypatch.setattr(study_training, "Trainer", None)
    study_distillation.main(command)
    assert out.with_suffix(".md").read_text() == page
    finished = out.with_suffix(".jsonl")
    lines = finished.read_text().splitlines(keepends=True)
    finished.write_text("".join(line for line in lines if '"run": "steps-sft-2"' not in line))
    with pytest.raises(TypeError):
        study_distillation.main(command)


def test_rows_of_other_settings_are_refused(out: Path, command: list[str]) -> None:
    changed = [*command, "--steps", "3"]
    with pytest.raises(ValueError, match="expected steps-sft-1 in .* to be made with steps = 3, found 2; "):
        study_distillation.main(changed)


@pytest.mark.parametrize("words", [["--steps", "1"], ["--seeds", "3", "3"], ["--arms", "none"]])
def test_impossible_requests_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        study_distillation.main(words)


def test_without_a_teacher_it_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match="found none; make it with `python train.py fit --config benchmarks/distillation/teacher.yaml",
    ):
        study_distillation.main(["--teacher", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_the_student_has_half_of_the_layers(tmp_path: Path) -> None:
    teacher = tiny_folder(tmp_path / "teacher", num_hidden_layers=5)
    write_half(teacher, tmp_path / "student")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("student", "teacher"))
    assert len(ours.model.layers) == 2
    for kept, layer in zip((0, 2), ours.model.layers, strict=True):
        assert layer.mlp.up_proj.weight.equal(theirs.model.layers[kept].mlp.up_proj.weight)


def test_an_unfinished_write_is_no_row(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "study.jsonl")
    assert rows.find("a", {}) is None
    rows.write("a", {"settings": {"x": [1, 2]}})
    assert rows.find("a", {"x": (1, 2)}) == {"settings": {"x": [1, 2]}}
    assert [path.name for path in tmp_path.iterdir()] == ["study.jsonl"]
