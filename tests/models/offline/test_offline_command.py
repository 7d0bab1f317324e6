"""`python -m models.offline` takes what `train.py fit` takes."""

import json
from pathlib import Path

import pytest
import yaml

import train
from models.offline import OfflineTeacher, store
from models.offline.__main__ import _parser, main
from tests.helpers.short_runs import ROOT


@pytest.fixture
def recipe(tmp_path: Path, teacher_folder: str, student_folder: str) -> list[str]:
    rows = [{"prompt": f"What is {n} plus {n + 1}?", "response": str(2 * n + 1)} for n in range(40)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overlay = {
        "model": {"init_args": {"teacher": teacher_folder, "student": student_folder}},
        "data": {"init_args": {"train": str(tmp_path / "my.jsonl")}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(overlay))
    return ["--config", str(ROOT / "configs/distill.yaml"), "--config", str(tmp_path / "mine.yaml")]


def test_a_recipe_is_captured_as_its_training_would_see_it(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher_folder: str
) -> None:
    cache = tmp_path / "cache"
    given = [*recipe, "--config", str(ROOT / "configs/wandb.yaml"), "--trainer.max_steps", "5", "--output", str(cache)]
    assert main(given) == 0
    index = store.read_index(cache)
    assert (index["form"], index["dtype"], list(index["splits"])) == ("exact", "bfloat16", ["train", "val"])
    assert index["splits"]["train"]["samples"] == 38
    OfflineTeacher(cache, ["train", "val"])
    output = capsys.readouterr().out
    assert f"Capturing {teacher_folder} in bfloat16 over train, val" in output
    assert "80 bytes a token;" in output and "MB free" in output
    assert "answer tokens of 80 bytes" in output and "a second" in output
    assert f"--model.init_args.teacher offline:{cache}" in output
    assert main(given) == 0
    assert "Nothing to do: the capture was complete" in capsys.readouterr().out


def test_settings_reach_the_capture(recipe: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = "--form top_k --top_k 5 --splits train --batch_size 3 --shard_tokens 40 --trainer.precision 32-true --device cpu"
    assert main([*recipe, *options.split(), "--output", str(cache)]) == 0
    index = store.read_index(cache)
    found = [index[name] for name in ("form", "top_k", "batch_size", "shard_tokens", "dtype")]
    assert found == ["top_k", 5, 3, 40, "float32"] and list(index["splits"]) == ["train"]
    assert len(list(cache.glob("train-*.safetensors"))) == index["splits"]["train"]["shards"] > 1


@pytest.mark.parametrize("name", ["sft", "compress", "quickstart"])
def test_what_a_run_saved_as_its_configuration_is_taken(
    name: str, recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["fit", "--config", str(ROOT / f"configs/{name}.yaml"), "--print_config"])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    given = ["--config", str(tmp_path / "config.yaml"), "--checkpoint.every_n_steps", "5", "--name", "other"]
    options = _parser().parse_args([*given, "--output", "cache"])
    assert options.data.init_args.tokenizer == options.model.init_args.student
    assert options.trainer.precision == "bf16-mixed"


def test_mistakes_are_one_sentence(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "cache")]
    assert main([*recipe, "--model.init_args.teacher", "offline:cache", *output]) == 2
    assert "error: expected a model as model.init_args.teacher, found 'offline:cache'" in capsys.readouterr().err
    assert main([*recipe, "--splits", "test", *output]) == 2
    assert "error: expected test data, found none" in capsys.readouterr().err
    assert main([*recipe, "--model.init_args.teacher", "./nowhere", *output]) == 2
    assert "error: expected a Hugging Face folder at './nowhere'" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
