"""Reading files: both record forms, all sources, held-out parts, and one clear sentence for whatever is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from datamodules import Conversations
from datamodules.files import read_conversations


def record(number: int) -> dict[str, Any]:
    return {"prompt": f"What is {number}?", "response": f"{number} is a number."}


def as_messages(number: int) -> dict[str, Any]:
    plain = record(number)
    return {
        "messages": [
            {"role": "user", "content": plain["prompt"]},
            {"role": "assistant", "content": plain["response"]},
        ]
    }


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write records (texts as they are) to a JSONL file."""

    def write_jsonl(records: list[Any], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return str(path)

    return write_jsonl


def prompts(source: str, **kwargs: Any) -> list[str]:
    return [c.prompt[0]["content"] for c in read_conversations(source, default_split="train", **kwargs)]


def test_both_forms_of_a_record_mean_the_same(write: Write) -> None:
    plain, messages = read_conversations(write([record(1), "", as_messages(1)]), default_split="train")
    assert plain.messages == messages.messages
    assert (plain.answer, plain.source[-6:], messages.source[-6:]) == ("1 is a number.", "line 1", "line 3")


def test_parquet(tmp_path: Path) -> None:
    path = str(tmp_path / "data.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([as_messages(i) for i in range(5)]), path)
    assert prompts(path) == [f"What is {i}?" for i in range(5)]
    assert read_conversations(path, default_split="train")[4].source == f"{path} row 5"


def test_datasets_folder_and_split(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write([record(i) for i in range(3)], "set/train.jsonl")
    write([record(9)], "set/test.jsonl")
    folder = str(tmp_path / "set")
    assert prompts(folder) == [f"What is {i}?" for i in range(3)]
    assert prompts(f"{folder}:test") == ["What is 9?"]
    assert prompts(f"{folder}:train[1:2]") == ["What is 1?"]
    with pytest.raises(FileNotFoundError, match=r"a split 'nonsense', found none at .*set:nonsense"):
        prompts(f"{folder}:nonsense")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "a"', r"expected one JSON object a line, .*data.jsonl line 3 \(.*; mend or remove the line"),
        ('["a", "b"]', r"found a list in .*data.jsonl line 3"),
        ({"question": "a", "answer": 1}, r"found question \(str\), answer \(int\) in .*data.jsonl line 3; rename"),
        ({"prompt": "a", "response": None}, r"found prompt \(str\), response \(NoneType\) in .*line 3"),
        ({}, r"found no field in .*line 3"),
        (
            '{"prompt": "a", "prompt": "b", "response": "c"}',
            r"something unreadable in .*line 3 \('prompt' is there twice\)",
        ),
        ({"prompt": "a", "response": " "}, r"expected a text in every assistant message, found none in .*line 3: "),
        ({"messages": [{"role": "gpt", "content": "a"}]}, r"expected a role among .*, found 'gpt' in .*line 3"),
    ],
)
def test_broken_line_is_named_by_its_number(write: Write, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_conversations(write([record(0), "", bad, record(1)]), default_split="train")


def test_line_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "caf\xe9", "response": "b"}\n')
    with pytest.raises(ValueError, match=r"latin.jsonl line 2 \(.*utf-8"):
        read_conversations(str(path), default_split="train")


def test_missing_empty_and_wrong_files(tmp_path: Path, write: Write) -> None:
    for name in ("missing.jsonl", "missing.parquet"):
        with pytest.raises(FileNotFoundError, match=f"expected a file at '.*{name}', found none; check the path"):
            prompts(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"at least one conversation in '.*data.jsonl', found none"):
        prompts(write(["", ""]))
    with pytest.raises(ValueError, match=r"expected a Parquet file at .*fake.parquet, found another format"):
        prompts(write([record(1)], "fake.parquet"))


def test_unknown_datasets_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"found none at 'owner/name' \(Couldn't reach the Hub\); check"):
        prompts("owner/name")


def held_out(data: Conversations) -> tuple[list[str], list[str]]:
    data.setup("fit")
    train, val = ([c.prompt[0]["content"] for c in data.conversations(split)] for split in ("train", "val"))
    return train, val


def test_held_out_part_is_seeded_and_disjoint(write: Write, tokenizer_folder: str) -> None:
    path = write([record(i) for i in range(50)])
    train, val = held_out(Conversations(tokenizer_folder, path, val_fraction=0.2))
    assert (len(train), len(val)) == (40, 10)
    assert sorted(train + val) == sorted(f"What is {i}?" for i in range(50))
    assert held_out(Conversations(tokenizer_folder, path, val_fraction=0.2)) == (train, val)
    assert held_out(Conversations(tokenizer_folder, path, val_fraction=0.2, seed=1))[1] != val


def test_held_out_duplicates_of_training_prompts_are_removed(write: Write, tokenizer_folder: str) -> None:
    path = write([record(i) for i in range(20)] + [{**record(i), "response": "another"} for i in range(10)])
    data = Conversations(tokenizer_folder, path, val_fraction=0.5)
    train, val = held_out(data)
    assert not set(train) & set(val)
    assert data.num_duplicates_removed == 15 - len(val) > 0


def test_nothing_left_to_hold_out(write: Write, tokenizer_folder: str) -> None:
    with pytest.raises(
        ValueError, match=r"found 4 samples, of which 2 are left for training and 0 held out \(2 removed"
    ):
        Conversations(tokenizer_folder, write([record(1)] * 4), val_fraction=0.5).setup("fit")


def test_splits_that_were_not_given(write: Write, tokenizer_folder: str) -> None:
    data = Conversations(tokenizer_folder, write([record(1), record(2)]), val_fraction=0)
    data.setup("fit")
    assert len(data.conversations("train")) == 2
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"expected val data, found none; set `val` .* or val_fraction to more than 0"):
        data.setup("validate")
    with pytest.raises(ValueError, match="expected test data, found none; set `test`"):
        data.setup("predict")


@pytest.mark.parametrize("fraction", [-0.1, 1, 5])
def test_val_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"data.val_fraction between 0 and 1 \(1 excluded\), found {fraction}"):
        Conversations("any", "data.jsonl", val_fraction=fraction)


def test_scores_only_on_request(write: Write, tokenizer_folder: str) -> None:
    answers = ["yes", "no", "yes ", "yes"]
    path = write([{"prompt": f"{i}?", "response": answer} for i, answer in enumerate(answers)])
    data = Conversations(tokenizer_folder, path, test=path, score_exact_match=True)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert data.score([" " + answer for answer in batch["answers"]], batch, "test") == [1.0] * 4
    assert data.score(["yes"] * 4, batch, "test") == [float(a.strip() == "yes") for a in batch["answers"]]
    assert data.constant_answer_score("test") == 0.75
    silent = Conversations(tokenizer_folder, path, test=path)
    assert silent.score(answers, batch, "test") is silent.constant_answer_score("test") is None


def test_lists_in_lists_without_end_are_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"deep.jsonl line 1"):
        read_conversations(str(tmp_path / "deep.jsonl"), default_split="train")
