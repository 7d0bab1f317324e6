"""The how-to of ranking is run: its commands are accepted, and its code ranks with a tiny model."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from tiny import tiny_folder

import export.__main__ as export_main
import train
from benchmarks import ranking

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize("own_data", [False, True], ids=["MovieLens", "own data"])
def test_the_train_commands_are_accepted(own_data: bool, capsys: pytest.CaptureFixture[str]) -> None:
    (overlay,) = blocks("yaml")
    Path("my-ranking.yaml").write_text(overlay)
    found = commands("python", "train.py")
    assert len(found) == 3
    for arguments in found:
        if "--ckpt_path" in arguments:  # there is a checkpoint only after a run; tests/test_ranking_recipes.py has one
            position = arguments.index("--ckpt_path")
            arguments = arguments[:position] + arguments[position + 2 :]
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments, *(["--config", "my-ranking.yaml"] if own_data else []), "--print_config"])
        assert stop.value.code == 0
        data = yaml.safe_load(capsys.readouterr().out)["data"]
        if own_data:
            assert data["class_path"].endswith("Ranking")
            assert data["init_args"].items() >= yaml.safe_load(overlay)["data"]["init_args"].items()
        else:
            assert data["class_path"].endswith("MovieLens")


def test_the_export_command_and_the_code_rank_films(capsys: pytest.CaptureFixture[str]) -> None:
    commands_of_export = commands("python", "-m", "export")
    tiny_folder(Path(commands_of_export[0][0]), max_position_embeddings=1024)
    for arguments in commands_of_export:
        letters = [{"no": "n", "yes": "y"}.get(word, word) for word in arguments]  # all that the tiny tokenizer has
        assert export_main.main([*letters, "--benchmark-repetitions", "0", "--decode-steps", "1"]) == 0
    assert list(Path("exported-engine/engine").glob("labels-*.engine"))
    (code,) = blocks("python")
    assert '("no", "yes")' in code
    capsys.readouterr()
    names: dict[str, object] = {}
    exec(code.replace('("no", "yes")', '("n", "y")'), names)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(" ", 1)[1] for line in lines) == sorted(names["films"])
    probabilities = [float(line.split(" ", 1)[0]) for line in lines]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 <= probability <= 1 for probability in probabilities)


def test_the_benchmark_commands_are_accepted() -> None:
    found = commands("python", "-m", "benchmarks.ranking")
    options = [ranking.options_of(arguments) for arguments in found]
    assert [(parsed.repetitions > 0, parsed.load > 0, parsed.agreement) for parsed in options] == [
        (True, True, 0),
        (False, False, 1000),
    ]
