"""Where a setting comes from when a checkpoint is named: defaults, checkpoint, recipe, command line - in rising order."""

import logging
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train
from tests.helpers.tiny import tiny_folder, tiny_jsonl

LAST = "runs/sft-001/checkpoints/last.ckpt"
SAVED = "runs/sft-001/config.yaml"
DATA = ["--data", "Conversations", "--data.init_args.train", "my.jsonl"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, data, and one finished run of two steps."""
    place = tmp_path_factory.mktemp("settings")
    tiny_folder(place / "student", seed=1)
    tiny_folder(place / "wider", seed=1, intermediate_size=64)
    tiny_jsonl(place / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(20)])
    settings = {
        "name": "sft",
        "trainer": {"max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False},
        "model": {
            "class_path": "SFT",
            "init_args": {
                "student": "student",
                "generate_tokens": 5,
                "lr_schedule": "constant",
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.125, "momentum": 0.5}},
            },
        },
        "data": {"class_path": "Conversations", "init_args": {"train": "my.jsonl", "val_fraction": 0.2}},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert train.entry_point(["fit", "--config", "recipe.yaml"]) == 0
    return place


@pytest.fixture(autouse=True)
def inside(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)


def weights(cli: train.PotstillCLI) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in cli.model.state_dict().items()}


def assert_restored(cli: train.PotstillCLI) -> None:
    saved = torch.load(LAST, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights(cli).items())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ckpt_path", LAST, "--config", SAVED],
        ["--config", SAVED, "--ckpt_path", LAST],
        ["--config", "recipe.yaml", "--ckpt_path", LAST],
        ["--ckpt_path", LAST, "--model", "SFT", "--model.init_args.student", "student", *DATA],
    ],
    ids=["checkpoint, saved config", "saved config, checkpoint", "recipe, checkpoint", "no config"],
)
def test_validate_judges_the_checkpoint_however_it_is_named(arguments: list[str]) -> None:
    cli = train.main(["validate", *arguments])
    assert_restored(cli)
    assert cli.model.generate_tokens == 5
    assert cli.model.lr_schedule == "constant"


def test_without_a_checkpoint_the_saved_config_starts_from_the_model() -> None:
    saved = torch.load(LAST, weights_only=True)["state_dict"]
    fresh = weights(train.main(["validate", "--config", SAVED]))
    assert not all(torch.equal(tensor, saved[name]) for name, tensor in fresh.items())


def test_resume_goes_on_where_the_run_stopped_whatever_comes_first() -> None:
    first = train.main(["fit", "--ckpt_path", LAST, "--config", SAVED, "--trainer.max_steps", "4"])
    second = train.main(["fit", "--config", SAVED, "--trainer.max_steps", "4", "--ckpt_path", LAST])
    assert first.trainer.fit_loop.epoch_loop.batch_progress.total.completed == 4
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


def test_part_of_a_class_may_be_given_anew(caplog: pytest.LogCaptureFixture) -> None:
    """One setting of the optimizer from the command line, the other from the checkpoint."""
    arguments = ["--model", "SFT", "--model.init_args.student", "student", *DATA, "--trainer.max_steps", "3"]
    optimizer = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.init_args.lr", "0.25"]
    with caplog.at_level(logging.INFO):
        cli = train.main(["fit", *arguments, *optimizer, "--ckpt_path", LAST])
    spec = cli.config["fit"].model.init_args.optimizer.init_args
    assert (spec.lr, spec.momentum) == (0.25, 0.5)
    assert "model.optimizer.init_args.lr: 0.125 in the checkpoint, 0.25 now" in caplog.text
    assert "momentum" not in caplog.text


def test_another_class_takes_all_settings_from_now(caplog: pytest.LogCaptureFixture) -> None:
    models = ["--model", "Distillation", "--model.init_args.student", "student", "--model.init_args.teacher", "student"]
    with caplog.at_level(logging.INFO):
        cli = train.main(["validate", *models, *DATA, "--ckpt_path", LAST])
    assert_restored(cli)
    assert cli.model.generate_tokens == 64
    assert "all settings come from the command line" in caplog.text


def foreign_checkpoint() -> str:
    torch.save({"state_dict": {}, "hyper_parameters": {}, "pytorch-lightning_version": "2.6.0"}, "foreign.ckpt")
    return "foreign.ckpt"


def callback(name: str, **settings: str) -> list[str]:
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in settings.items())]


def damaged_checkpoint() -> str:
    Path("damaged.ckpt").write_bytes(Path(LAST).read_bytes()[:3000])
    return "damaged.ckpt"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (lambda: ["--ckpt_path", "gone.ckpt"], "gone.ckpt"),
        (lambda: ["--ckpt_path", "my.jsonl"], "my.jsonl"),
        (lambda: ["--ckpt_path", damaged_checkpoint()], "damaged.ckpt"),
        (lambda: ["--ckpt_path", foreign_checkpoint()], "without a student's structure"),
        (lambda: ["--ckpt_path", LAST, "--model.init_args.student", "wider"], "(32, 64)"),
    ],
    ids=["missing", "no checkpoint", "damaged", "foreign", "another student"],
)
def test_a_wrong_checkpoint_is_one_sentence_and_leaves_nothing(
    arguments: Callable[[], list[str]], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir("runs"))
    assert train.entry_point(["fit", "--config", SAVED, *arguments()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "expected a checkpoint" in lines[0] and "found" in lines[0] and named in lines[0]
    assert sorted(os.listdir("runs")) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.init_args.warmup_steps", "-1"], "model.warmup_steps between 0 and 1,000,000,000, found -1"),
        (["--model.init_args.warmup_steps", "99"], "model.warmup_steps between 0 and 2, found 99"),
        (["--model.init_args.generate_tokens", "-1"], "model.generate_tokens between 0 and"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches between 1 and"),
        (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches between"),
        (["--data.init_args.batch_size", "null"], "a value for data.init_args.batch_size, found null"),
        (["--trainer.devices", "null"], "settings that the trainer takes, found others"),
        (["--name", "../outside"], "a --name without folders, found '../outside'"),
        (["--root", "/proc/none"], "a file or folder that is usable at '/proc/none'"),
        (["--data.init_args.train", ""], "found none at ''"),
        (callback("ExportOnFitEnd", formats="[]"), "formats among hf, onnx and engine, found none"),
        (callback("ExportOnFitEnd", verify_prompts="0"), "ExportOnFitEnd.verify_prompts between 1 and"),
        (
            callback("ExportOnFitEnd", batch="[4, 1, 16]"),
            "batch as smallest, usual and largest number in this order, found 4 1 16",
        ),
        (callback("ExportOnFitEnd", output="my.jsonl"), "my.jsonl"),
        (callback("GradualPruning", mlp_sparsity="0.5", ridge=".nan"), "ridge between 0 and 1,000, found nan"),
        (
            callback("GradualPruning", mlp_sparsity="0.001", multiple="8", start_step="1", end_step="1"),
            "removes nothing",
        ),
        (
            [
                *callback("GradualPruning", mlp_sparsity="0.5", start_step="1", end_step="1"),
                *callback("GradualPruning", mlp_sparsity="0.5", start_step="1", end_step="1"),
            ],
            "more than one stateful callback of type `GradualPruning`",
        ),
    ],
)
def test_a_number_out_of_its_range_is_one_sentence_and_leaves_nothing(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir("runs"))
    try:
        status = train.entry_point(["fit", "--config", SAVED, "--trainer.max_steps", "2", *arguments])
    except SystemExit as stop:  # the parser builds the model to look at its settings
        status = int(stop.code or 0)
    assert status == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "expected" in line and named in line
    assert sorted(os.listdir("runs")) == before


@pytest.mark.parametrize(
    "key",
    [
        "name",
        "trainer.accumulate_grad_batches",
        "checkpoint.every_n_steps",
        "data.init_args.max_length",
        "model.init_args.optimizer",
    ],
)
def test_a_null_in_a_file_is_no_value(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir("runs"))
    nested: Any = None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    (tmp_path / "null.yaml").write_text(yaml.safe_dump(nested))
    words = ["fit", "--config", SAVED, "--config", str(tmp_path / "null.yaml"), "--trainer.max_steps", "2"]
    assert train.entry_point(words) == 2
    assert f"error: expected a value for {key}, found null; leave it out" in capsys.readouterr().err
    assert sorted(os.listdir("runs")) == before


def test_a_mistake_on_the_command_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--no.such.setting", "1"], ["--trainer.max_steps", "many"]):
        with pytest.raises(SystemExit):
            train.main(["fit", "--config", SAVED, *arguments])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "usage" in line or "error" in line]
        assert line.startswith("error: ") and line.endswith("fit --help)")


def test_a_saved_config_names_no_folder_of_the_old_run() -> None:
    text = Path(SAVED).read_text()
    assert "runs/sft-001" not in text
    assert not {"ckpt_path", "run_dir"} & yaml.safe_load(text).keys()


@pytest.mark.parametrize("found", ["no file that can be read", "a folder"])
def test_a_recipe_that_does_not_exist_is_answered_with_those_that_do(
    found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path if found == "a folder" else tmp_path / "nope.yaml")
    with pytest.raises(SystemExit) as stop:
        train.main(["fit", "--config", path])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: expected a recipe at {path!r}, found {found}; check the path, or take one of configs/: "
    )
    recipes = Path(train.__file__).parent.glob("configs/*.yaml")
    assert all(recipe.name in line for recipe in recipes) and line.endswith("fit --help)")


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n" for before, after in pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: {max_steps: 3}\nmodel: {class_path: SFT}\ntrainer: {max_steps: 4}\n", "found 'trainer' twice"),
        ("trainer:\n  max_steps: 3\n  precision: 32\n  max_steps: 4\n", "found 'max_steps' twice below line 2"),
        (BOMB, "expected at most 100,000 settings, found aliases for"),
    ],
)
def test_a_file_that_says_two_things_or_too_much_is_refused(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        train.main(["fit", "--config", str(tmp_path / "recipe.yaml")])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
