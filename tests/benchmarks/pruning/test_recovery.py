"""The recovery study from its command line, with a tiny teacher: equal tokens, all cuts made, and its section of the page."""

from pathlib import Path

import pytest

from benchmarks import trained as study_training
from benchmarks.pruning import recovery as study_recovery
from benchmarks.study import Rows
from tests.helpers.study_commands import study_command
from tests.helpers.study_pages import page_beside
from tests.helpers.tiny import tiny_folder

pytestmark = pytest.mark.long

ARMS = list(study_recovery.ARMS)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Ten steps and two seeds of every arm."""
    folder = tmp_path_factory.mktemp("recovery")
    teacher = tiny_folder(
        folder / "teacher", hidden_size=48, intermediate_size=512, num_attention_heads=6, num_key_value_heads=3
    )
    return study_command(folder, teacher, "out/recovery", steps=10, train_size=40)


@pytest.fixture(scope="module")
def out(command: list[str]) -> Path:
    path = Path(command[command.index("--out") + 1])
    page_beside(path, "pruning", "pruning/recovery")
    study_recovery.main(command)
    return path


def test_every_run_ends_with_the_same_sizes(out: Path) -> None:
    rows = Rows(out.with_suffix(".jsonl")).all()
    assert rows.keys() == {"teacher", *(f"{arm}-{seed}" for arm in ARMS for seed in (1, 2))}
    for name, row in rows.items():
        if name != "teacher":
            events = row["history"]
            assert len(events) == (3 if "gradual" in name else 1)
            assert [event["step"] for event in events] == ([1, 3, 5] if "gradual" in name else [1])
            assert (events[-1]["neurons_per_layer"], events[-1]["kv_groups_per_layer"]) == (320, 2)
            assert row["kl"] > 0 and row["settings"]["mlp_sparsity"] == 0.375


def test_runs_differ_where_they_should(out: Path) -> None:
    rows = Rows(out.with_suffix(".jsonl")).all()
    for seed in (1, 2):
        assert len({rows[f"{arm}-{seed}"]["kl"] for arm in ARMS}) == len(ARMS)
    assert all(rows[f"{arm}-1"]["kl"] != rows[f"{arm}-2"]["kl"] for arm in ARMS)


def test_the_page_shows_means_and_differences(out: Path) -> None:
    section = out.with_suffix(".md").read_text()
    rows = Rows(out.with_suffix(".jsonl")).all()
    mean = (rows["gradual-1"]["kl"] + rows["gradual-2"]["kl"]) / 2
    assert f"{mean:.3f} ± " in next(line for line in section.splitlines() if line.startswith("| gradual |"))
    assert "| KL, gold answers: gradual against one_shot |" in section
    assert (out / "recovery.png").is_file()


def test_a_second_time_nothing_is_trained(out: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_training, "Trainer", None)
    study_recovery.main(command)
    with pytest.raises(ValueError, match="to be made with steps = 11, found 10"):
        study_recovery.main([*command, "--steps", "11"])


def test_no_teacher_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a fine-tuned teacher at 'nowhere', found none; make it with"):
        study_recovery.main(["--teacher", "nowhere", "--out", str(tmp_path)])
