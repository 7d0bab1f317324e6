"""The ranking study from its command line, with a tiny model and tiny MovieLens: every run, its page, and no run twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.ranking import study as study_ranking
from benchmarks.study import Rows
from tests.helpers.study_pages import page_beside
from tests.helpers.tiny import tiny_folder
from tests.helpers.tiny_movielens import tiny_movielens

STUDENTS, ARMS, SEEDS = ("half", "pruned_40"), ("labels", "distilled", "distilled_fp8"), (1, 2)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    folder = tmp_path_factory.mktemp("ranking_study")
    tiny_movielens(folder / "films")
    words = [
        "--model",
        tiny_folder(folder / "model"),
        "--out",
        str(folder / "out"),
        "--json",
        str(folder / "rows.json"),
    ]
    words += ["--teacher-steps", "2", "--steps", "4", "--seeds", "1", "2", "--students", *STUDENTS, "--history", "1"]
    sizes = {"LABELS": ["n", "y"], "FOLDER": str(folder / "films"), "MULTIPLE": 8, "LENGTH": 8, "REPETITIONS": 3}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WORK": folder / "work", **sizes}.items():
            patch.setattr(study_ranking, name, value)
        yield [*words, "--batch-size", "2", "--test-size", "8"]


@pytest.fixture(scope="module")
def out(command: list[str]) -> Path:
    path = Path(command[command.index("--out") + 1])
    made = page_beside(path, "ranking", "ranking")
    without = [line for line in made.read_text().splitlines(keepends=True) if "title: pruned_20" not in line]
    made.write_text("".join(without))  # a student that is not among the two
    study_ranking.main(command)
    return path


def rows_of(out: Path) -> dict[str, dict]:
    return Rows(out.with_suffix(".jsonl")).all()


def test_every_run_leaves_a_row(out: Path) -> None:
    rows = rows_of(out)
    runs = {f"{name}-{arm}-{seed}" for name in STUDENTS for arm in ARMS for seed in SEEDS}
    assert rows.keys() == {"teacher-before", *(f"{name}-before" for name in STUDENTS), *runs}
    assert rows["teacher-before"]["auroc_difference"] == 0
    parameters = {name: rows[f"{name}-before"]["parameters"] for name in ("teacher", *STUDENTS)}
    assert parameters["half"] < parameters["teacher"] and parameters["pruned_40"] < parameters["teacher"]
    for row in rows.values():
        assert row["auroc_difference"] == pytest.approx(row["auroc"] - row["teacher_auroc"], abs=1e-6)


def test_arms_and_seeds_differ(out: Path) -> None:
    rows = rows_of(out)
    losses = {name: rows[name]["log_loss"] for name in rows if "half" in name}
    assert len(set(losses.values())) == len(losses)


def test_the_page_has_every_student(out: Path) -> None:
    page = out.with_suffix(".md").read_text()
    for name in STUDENTS:
        for title in ("before", "labels", "distilled", "distilled_fp8"):
            assert f"| {name} | {title} |" in page
    mean = sum(rows_of(out)[f"half-labels-{seed}"]["auroc"] for seed in SEEDS) / 2
    assert f"| half | labels | {mean:.4f} " in page
    assert (out / "auroc.png").is_file()


def test_a_second_time_nothing_is_trained(out: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_ranking, "train", None)
    study_ranking.main(command)
    with pytest.raises(ValueError, match="to be made with steps = 5, found 4"):
        study_ranking.main(
            [*command[: command.index("--steps")], *command[command.index("--steps") + 2 :], "--steps", "5"]
        )
