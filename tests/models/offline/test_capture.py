"""What a capture writes, what it refuses, and that a killed one ends with the same files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from models.offline import CaptureSettings, capture, store
from models.offline.capture import shards_of
from models.offline.fingerprints import data_fingerprint, example_identity, num_answer_tokens, row_identities
from models.offline.teacher import OfflineTeacher
from models.teacher import Teacher
from tests.helpers.chat_doubles import Words, byte_tokenizer
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_folder

Captured = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("form", "expected"),
    [("exact", 2 * 40), ("top_k", 4 * 7 + 4)],
    ids=["two bytes a number", "four bytes a token, and the tail"],
)
def test_the_bytes_of_a_token_are_the_documented_ones(
    form: str, expected: int, captured: Captured, data: Words
) -> None:
    folder = captured(form=form, top_k=7)
    index = store.read_index(folder)
    assert index["bytes_per_token"] == expected
    rows = ("hidden", "log_probabilities", "tokens", "log_tail")
    on_disk = sum(
        tensor.nbytes
        for path in folder.glob("*-0*.safetensors")
        for name, tensor in load_file(path).items()
        if name in rows
    )
    num_tokens = sum(num_answer_tokens(example) for split in ("train", "val") for example in data.examples(split))
    assert on_disk == expected * num_tokens
    assert sum(split["answer_tokens"] for split in index["splits"].values()) == num_tokens
    assert (folder / "head.safetensors").exists() == (form == "exact")


def test_shards_are_full_but_not_fuller(data: Words) -> None:
    examples = data.examples("train")
    counts = [num_answer_tokens(example) for example in examples]
    shards = shards_of(examples, 100)
    assert [i for shard in shards for i in shard] == list(range(len(examples)))
    sizes = [sum(counts[i] for i in shard) for shard in shards]
    assert max(sizes) <= 100
    assert all(size + counts[after.start] > 100 for size, after in zip(sizes, shards[1:], strict=False))
    assert [len(shard) for shard in shards_of(examples, 1)] == [1] * len(examples)


def test_a_sample_has_the_same_identity_in_a_batch(data: Words) -> None:
    examples = {example.index: example for example in data.examples("train")}
    for batch in data.train_dataloader():
        assert row_identities(batch) == [example_identity(examples[i]) for i in batch["index"]]
    assert len({example_identity(example) for example in examples.values()}) == len(examples)


def test_the_datas_fingerprint_sees_order_and_answers(data: Words) -> None:
    examples = data.examples("train")
    fingerprint = data_fingerprint(examples)
    assert fingerprint == data_fingerprint(list(examples))
    assert fingerprint["samples"] == 50 and fingerprint["tokens"] == sum(map(len, examples))
    assert data_fingerprint(examples[::-1])["sha256"] != fingerprint["sha256"]
    assert data_fingerprint(examples[:-1])["sha256"] != fingerprint["sha256"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("form", ["exact", "top_k"])
def test_a_capture_that_was_stopped_continues(form: str, captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(captured("whole", form=form))
    asked: list[int] = []
    answer, write = Teacher.answer_hidden, store.write_shard

    def counting(self: Teacher, batch: Any) -> torch.Tensor:
        asked.extend(batch["index"])
        return answer(self, batch)

    def stopping(path: Path, *arguments: Any) -> None:
        if path.name == "train-00002.safetensors":
            raise Stopped
        write(path, *arguments)

    monkeypatch.setattr(Teacher, "answer_hidden", counting)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_shard", stopping)
        with pytest.raises(Stopped):
            captured("stopped", form=form)
    kept = contents(captured("stopped", form=form).parent / "stopped")  # this is the second start
    assert kept == whole and len(whole) > 5
    repeated = len(asked) - 70
    assert 0 < repeated < 30, "only the shard that was not finished is made again"


class Command(NamedTuple):
    arguments: list[str]
    output: Path


DYING = """
import os, signal, sys
from models.offline import __main__, store
write = store.save_file
def dying(tensors, path, metadata):
    write(tensors, path, metadata=metadata)
    if path.name == "train-00001.safetensors":
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
store.save_file = dying
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_capture_killed_in_mid_write_continues_to_the_same_files(command: Command, capsys: Any) -> None:
    from models.offline.__main__ import main

    other = [*command.arguments[:-1], str(command.output.with_name("whole"))]
    killed = subprocess.run([sys.executable, "-c", DYING, *command.arguments], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    left = contents(command.output)
    assert "train-00000.safetensors" in left and "train-00001.safetensors" not in left
    assert any(name.startswith(".writing-") for name in left), "half a shard was written when the kill came"
    before = (command.output / "train-00000.safetensors").stat().st_mtime_ns
    assert main(command.arguments) == 0 and main(other) == 0
    assert contents(command.output) == contents(command.output.with_name("whole"))
    assert (command.output / "train-00000.safetensors").stat().st_mtime_ns == before


@pytest.fixture
def command(tmp_path: Path, teacher_folder: str, student_folder: str) -> Command:
    rows = [{"prompt": f"What is {n} plus {n + 1}?", "response": str(2 * n + 1)} for n in range(40)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--config", str(ROOT / "configs/distill.yaml"), "--data.init_args.train", str(tmp_path / "my.jsonl")]
    arguments += ["--model.init_args.teacher", teacher_folder, "--model.init_args.student", student_folder]
    return Command([*arguments, "--shard_tokens", "50", "--output", str(tmp_path / "cache")], tmp_path / "cache")


@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_a_damaged_shard_is_made_again(damage: str, captured: Captured, capsys: pytest.CaptureFixture[str]) -> None:
    folder = captured()
    whole = contents(folder)
    path = folder / "train-00001.safetensors"
    broken = bytearray(path.read_bytes())
    broken[-3] ^= 1
    path.write_bytes(broken if damage == "one bit" else broken[:-100])
    captured()
    assert contents(folder) == whole
    assert f"{path} is damaged: captured again" in capsys.readouterr().out


def test_a_folder_is_continued_with_its_own_settings_only(captured: Captured, tmp_path: Path) -> None:
    whole = contents(captured())
    with pytest.raises(ValueError, match="expected the form .* captured with, exact, found top_k"):
        captured(form="top_k")
    with pytest.raises(ValueError, match="expected the batch_size .*, 4, found 5"):
        captured(batch_size=5)
    with pytest.raises(ValueError, match="expected the dtype .*, float32, found bfloat16"):
        captured(dtype=torch.bfloat16)
    other = tiny_folder(tmp_path / "other", seed=8, hidden_size=40, intermediate_size=64)
    with pytest.raises(
        ValueError,
        match=r"expected the teacher .*, [0-9a-f]{12} \(family llama, parameters \d+\), found [0-9a-f]{12} \(",
    ):
        captured(reference=other)
    assert contents(tmp_path / "cache") == whole


def test_a_moved_teacher_is_the_same_teacher(captured: Captured, teacher_folder: str, tmp_path: Path) -> None:
    whole = contents(captured())
    moved = tiny_folder(tmp_path / "moved", seed=7, hidden_size=40, intermediate_size=64)
    assert contents(captured(reference=moved)) == whole


def test_foreign_files_are_not_mixed_in(captured: Captured, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="found other files"):
        captured()
    assert contents(tmp_path / "cache") == {"notes.txt": b"mine"}
    first, second = captured("first"), captured("second", batch_size=5)
    (first / "train-00001.safetensors").write_bytes((second / "train-00001.safetensors").read_bytes())
    with pytest.raises(ValueError, match="expected a shard of the capture .* found one of"):
        captured("first")
    with pytest.raises(ValueError, match="expected a shard of the capture .* found one of"):
        OfflineTeacher(first, ["train"])


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    with pytest.raises(ValueError, match=r"expected 0\.1 MB of free space .* found 0\.1 MB"):
        captured()
    assert not (tmp_path / "cache").exists()


def test_the_announced_size_is_the_final_one(captured: Captured) -> None:
    from models.offline.capture import estimated_bytes

    folder = captured(shard_tokens=10_000)
    size = sum(map(len, contents(folder).values()))
    assert 0 < size - estimated_bytes(store.read_index(folder)) < 5000  # headers and the index


def test_bad_settings_and_other_tokenizers_are_refused(captured: Captured, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--top_k between 1 and 1,000,000,000, found 0"):
        CaptureSettings(top_k=0)
    with pytest.raises(ValueError, match="--top_k of at most 260 .* found 261"):
        captured(form="top_k", top_k=261)
    other = tiny_folder(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="share one tokenizer"):
        captured(reference=other)
    assert not (tmp_path / "cache").exists()


def test_capture_reports_what_this_run_did(teacher_folder: str, data: Words, tmp_path: Path) -> None:
    def run() -> Any:
        return capture(
            teacher_folder, data, tmp_path / "c", CaptureSettings(shard_tokens=200), splits=["val"], dtype=torch.float32
        )

    first, second = run(), run()
    assert first.captured_answer_tokens == first.answer_tokens == sum(map(num_answer_tokens, data.examples("val")))
    assert first.captured_tokens == sum(map(len, data.examples("val")))
    assert second.captured_tokens == 0 and second.answer_tokens == first.answer_tokens
    assert second.total_bytes == sum(map(len, contents(tmp_path / "c").values()))
