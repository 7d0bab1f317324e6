"""A program says its own words, and those of no library."""

import csv
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import train
from program.screen import as_command, sentence
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_folder, tiny_jsonl


def test_no_library_speaks_first() -> None:
    command = [sys.executable, "-m", "export", "--help"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.startswith("usage: python -m export")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("expected a number, found\n  text; change it"), "expected a number, found text; change it"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out"), "usable at 'out', found: Permission denied; choose one that you may use"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "found: No space left on device; free some space"),
        (MemoryError(), "expected enough memory, found none left"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "expected enough memory"),
    ],
)  # fmt: skip
def test_an_error_that_the_user_can_mend_is_one_sentence(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @as_command
    def main(_: object) -> int:
        raise error

    assert main(None) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    monkeypatch.setenv("POTSTILL_DEBUG", "1")
    with pytest.raises(type(error)):
        main(None)


def test_our_own_mistakes_show_their_stack() -> None:
    @as_command
    def main(_: object) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main(None)
    assert sentence(RuntimeError("a bug")) == "a bug"


SHORT = {
    "trainer": {
        "max_steps": 8,
        "val_check_interval": 4,
        "num_sanity_val_steps": 0,
        "callbacks": [{"class_path": "PhaseEvaluation", "init_args": {"generate_tokens": 0}}],
    },
    "model": {"init_args": {"generate_tokens": 0, "warmup_steps": 1}},
    "data": {"init_args": {"batch_size": 4, "val_fraction": 0.2}},
}


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a short fine-tuning run."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "my-model")
    tiny_jsonl(tmp_path / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(30)])
    Path("short.yaml").write_text(yaml.safe_dump(SHORT))
    files = ["--config", str(ROOT / "configs/sft.yaml"), "--config", "short.yaml"]
    return ["fit", *files, "--model.init_args.student", "my-model", "--data.init_args.train", "my.jsonl"]


@pytest.mark.recipe
def test_a_log_of_a_run_has_a_few_lines_all_of_them_ours(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    number = r"\d+\.?\d*(e[+-]\d+)?"
    expected = [
        r"Phases are judged on the val split: there is no test data",
        r"Preflight passed in \d+\.\d s",
        r"Training [\d,]+ parameters for 8 steps on \w+ in bf16-mixed; results go to runs/sft-001",
        rf"Validation at step 4: \d\d:\d\d, perplexity {number}",
        rf"Training: 8 steps in \d\d:\d\d, loss {number}",
        rf"Validation at step 8: \d\d:\d\d, perplexity {number}",
        r"Judging: trained: \d\d:\d\d",
        rf"Phase trained: perplexity {number}",
    ]
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(expected), done.stderr
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line


@pytest.mark.parametrize(
    ("more", "logged"),
    [([], 8), (["--trainer.log_every_n_steps", "3"], 2), (["--trainer.log_every_n_steps", "50"], 1)],
    ids=["by the run's length", "as asked for", "the last step at the latest"],
)
def test_a_short_run_logs_its_loss(more: list[str], logged: int, arguments: list[str]) -> None:
    quick = ["--trainer.callbacks=[]", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    assert train.entry_point([*arguments, *quick, *more]) == 0
    rows = list(csv.DictReader(Path("runs/sft-001/metrics.csv").read_text().splitlines()))
    assert len([row for row in rows if row["train/loss"]]) == logged


def test_test_data_that_nothing_judges_are_not_passed_over(
    arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    quick = ["--trainer.callbacks=[]", "--trainer.limit_val_batches=0", "--trainer.max_steps=1"]
    assert train.entry_point([*arguments, *quick, "--data.init_args.test", "my.jsonl"]) == 0
    assert "The test split is not read by this recipe" in caplog.text
