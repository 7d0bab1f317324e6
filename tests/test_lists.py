"""Lists of an overlay replace those of the recipe, whatever their length; all else is merged key by key."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ActionConfigFile

import train

RECIPE = """
trainer:
  callbacks:
    - class_path: PhaseEvaluation
      init_args: {generate_tokens: 5, split: val}
    - class_path: Throughput
      init_args: {every_n_steps: 3}
  logger:
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {save_dir: there, name: recipe}
model:
  class_path: SFT
  init_args:
    student: unread
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.5, betas: [0.1, 0.2]}}
data:
  class_path: Conversations
  init_args: {train: unread.jsonl}
"""


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)


def combined(overlay: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    Path("overlay.yaml").write_text(overlay)
    with pytest.raises(SystemExit) as stop:
        train.main(["fit", "--config", "recipe.yaml", "--config", "overlay.yaml", *more, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def callbacks_of(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(entry["class_path"].rpartition(".")[2], entry["init_args"]) for entry in settings["trainer"]["callbacks"]]


SAME_CLASSES = """
trainer:
  callbacks:
    - class_path: PhaseEvaluation
      init_args: {generate_tokens: 7}
    - class_path: Throughput
"""


def test_an_entry_of_the_same_class_at_the_same_place_takes_over_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found = callbacks_of(combined(SAME_CLASSES, capsys))
    assert found == [
        ("PhaseEvaluation", {"generate_tokens": 7, "split": None}),
        ("Throughput", {"every_n_steps": 10}),
    ]


def test_the_parser_alone_would_take_over_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once this fails, jsonargparse replaces lists itself and `ConfigFile` may go."""
    monkeypatch.setattr(train.ConfigFile, "__call__", ActionConfigFile.__call__)
    found = callbacks_of(combined(SAME_CLASSES, capsys))
    assert found[0] == ("PhaseEvaluation", {"generate_tokens": 7, "split": "val"})


def test_lists_are_appended_to_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    overlay = "trainer:\n  callbacks+:\n    - class_path: SampleCompletions\n"
    more = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.init_args.log_momentum=true"]
    found = callbacks_of(combined(overlay, capsys, *more))
    assert [name for name, _ in found] == ["PhaseEvaluation", "Throughput", "SampleCompletions", "LearningRateMonitor"]
    assert found[0][1] == {"generate_tokens": 5, "split": "val"}
    assert found[-1][1]["log_momentum"] is True


def test_other_lists_and_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    """Loggers, lists inside a class, a class named in dotted form, and settings beside them."""
    overlay = """
trainer.logger:
  - class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: here}
model:
  init_args:
    optimizer: {init_args: {betas: [0.3, 0.4]}}
"""
    settings = combined(overlay, capsys, "--model.init_args.warmup_steps=9")
    (logger,) = settings["trainer"]["logger"]
    assert logger["init_args"]["save_dir"] == "here"
    assert logger["init_args"]["name"] == "lightning_logs"
    optimizer = settings["model"]["init_args"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["betas"]) == (0.5, [0.3, 0.4])
    assert settings["model"]["init_args"]["student"] == "unread"
    assert settings["model"]["init_args"]["warmup_steps"] == 9
    assert callbacks_of(settings)[0] == ("PhaseEvaluation", {"generate_tokens": 5, "split": "val"})


@pytest.mark.parametrize("content", [None, "a: [1\n", "- 1\n"], ids=["missing", "broken", "no settings"])
def test_what_is_no_overlay_is_refused_by_the_parser(content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        Path("bad.yaml").write_text(content)
    with pytest.raises(SystemExit) as stop:
        train.main(["fit", "--config", "recipe.yaml", "--config", "bad.yaml", "--print_config"])
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
