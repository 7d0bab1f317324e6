"""Conversations as files that the export command reads."""

import json
from pathlib import Path

import pytest

from benchmarks import chats
from export.verify.prompts import prompts_for_verification
from models.loading.reference import load_tokenizer
from tests.helpers.tiny import tiny_folder


def test_conversations_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        chats, "calibration_prompts", lambda count: [f"say {'word ' * (5 - n)}{n}" for n in range(count)]
    )
    monkeypatch.setattr(chats, "held_out_prompts", lambda: ["why?", "what is that, and where?"])
    model = tiny_folder(tmp_path / "model", vocab_size=259)
    files = [tmp_path / "calibration.jsonl", tmp_path / "questions.jsonl"]
    chats.main(["--model", model, "--samples", "3", "--calibration", str(files[0]), "--held-out", str(files[1])])
    calibration, held_out = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [row["prompt"] for row in calibration] == chats.calibration_prompts(3)
    assert [row["prompt"] for row in held_out] == chats.held_out_prompts()
    assert all(row["response"] for row in [*calibration, *held_out])
    assert len(prompts_for_verification(load_tokenizer(model), files[1], 2)["prompt_ids"]) == 2


def test_a_file_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chats.main([])
    assert "expected a file to write, found none" in capsys.readouterr().err
