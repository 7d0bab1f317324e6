"""The how-to of ranking: own data in its recipes, and its benchmarks. Its commands run in test_commands_of_docs.py."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import train
from benchmarks.ranking import __main__ as ranking
from tests.helpers.short_runs import ROOT

PAGE = (ROOT / "docs/howto-ranking.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands(*beginning: str) -> list[list[str]]:
    """The arguments of all commands that begin so."""
    lines = [shlex.split(line) for line in "".join(blocks("bash")).replace("\\\n", "").splitlines()]
    return [words[len(beginning) :] for words in lines if tuple(words[: len(beginning)]) == beginning]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)


def test_own_data_take_the_place_of_movielens(capsys: pytest.CaptureFixture[str]) -> None:
    (overlay,) = blocks("yaml")
    Path("my-ranking.yaml").write_text(overlay)
    found = [arguments for arguments in commands("python", "train.py") if "--ckpt_path" not in arguments]
    assert len(found) == 2
    for arguments in found:
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments, "--config", "my-ranking.yaml", "--print_config"])
        assert stop.value.code == 0
        data = yaml.safe_load(capsys.readouterr().out)["data"]
        assert data["class_path"].endswith("Ranking")
        assert data["init_args"].items() >= yaml.safe_load(overlay)["data"]["init_args"].items()


def test_the_benchmark_commands_are_accepted() -> None:
    found = commands("python", "-m", "benchmarks.ranking")
    options = [ranking.options_of(arguments) for arguments in found]
    assert [(parsed.repetitions > 0, parsed.load > 0, parsed.agreement) for parsed in options] == [
        (True, True, 0),
        (False, False, 1000),
    ]
