"""The capture: run the teacher over the data once and keep its answers.

Samples go into shards in the order of the split; a shard is full at `shard_tokens` answer tokens.  Within a shard they are batched
by length.  Both are functions of the data and the settings alone, so a capture that was killed goes on at the first shard that is
missing and ends with the same bytes as one that was not.

Legend: N answer tokens.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from datamodules.base import ChatDataModule
from datamodules.chat import Example
from datamodules.collate import collate, pad_id_of
from models.loading.reference import check_same_tokenizer, load_tokenizer
from models.losses.output_head import check_head, head_of
from models.offline import fingerprints, store
from models.offline.forms import Columns, bytes_per_token, encode_exact, encode_top_k
from models.teacher import Teacher
from program.progress import Bar
from program.ranges import Positive, check_fields

BYTES_PER_SAMPLE = 4 * 8  # its position, identity, offset and checksum


@dataclass(frozen=True)
class CaptureSettings:
    """How a teacher is captured.

    Args:
        form: exact keeps final hidden states in bfloat16 and the head (full-vocabulary losses); top_k keeps the most probable
            tokens and the mass of all others.
        top_k: Tokens kept for each answer token in the form top_k.
        batch_size: Samples that the teacher reads at once.
        shard_tokens: Answer tokens in a file, about; a kill loses at most one file's work.
    """

    form: Literal["exact", "top_k"] = "exact"
    top_k: Positive = 64
    batch_size: Positive = 16
    shard_tokens: Positive = 65536

    def __post_init__(self) -> None:
        check_fields(self, "--")


@dataclass(frozen=True)
class CaptureReport:
    """What a capture wrote: figures of the whole folder, and how fast this run was."""

    bytes_per_token: int
    answer_tokens: int
    total_bytes: int
    captured_answer_tokens: int
    captured_tokens: int
    seconds: float


def capture(
    reference: str,
    datamodule: ChatDataModule,
    folder: Path,
    settings: CaptureSettings,
    *,
    splits: Sequence[str],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> CaptureReport:
    """Write the teacher's answers to the splits into a folder, or finish a capture that was begun there.

    The data is what training will use, with the student's tokenizer; splits are some of train, val and test.  The
    teacher computes in `dtype`, on `device`.

    Raises:
        ValueError: Tokenizers differ, a setting is out of range, the folder holds another capture, or the disk is too small;
            nothing has been written then.
    """
    check_same_tokenizer(datamodule.tokenizer, load_tokenizer(reference, trust_remote_code=trust_remote_code))
    examples = {split: datamodule.examples(split) for split in splits}
    teacher = Teacher(reference, dtype=dtype, trust_remote_code=trust_remote_code)
    index = _index(teacher, datamodule.tokenizer, examples, settings)
    _check_room(folder, index)
    store.begin(folder, index)
    key = store.key_of(index)
    if index["head"]:
        try:
            store.read_head(folder, index)
        except store.DamagedError:
            store.write_head(folder, key, head_of(teacher.model))
    return _Run(teacher.to(torch.device(device)), index, key, folder, pad_id_of(datamodule.tokenizer)).over(examples)


def estimated_bytes(index: store.Index) -> int:
    """Size of a finished capture, without the files' headers."""
    size = sum(
        d["answer_tokens"] * index["bytes_per_token"] + d["samples"] * BYTES_PER_SAMPLE
        for d in index["splits"].values()
    )
    return size + (index["head"]["bytes"] if index["head"] else 0)


def shards_of(examples: Sequence[Example], shard_tokens: int) -> list[range]:
    """Consecutive samples, each shard with as many as fit into `shard_tokens` answer tokens, and at least one."""
    bounds, size = [0], 0
    for number, example in enumerate(examples):
        count = fingerprints.num_answer_tokens(example)
        if number > bounds[-1] and size + count > shard_tokens:
            bounds.append(number)
            size = 0
        size += count
    return [range(start, stop) for start, stop in zip(bounds, [*bounds[1:], len(examples)], strict=True)]


def _index(
    teacher: Teacher, tokenizer: PreTrainedTokenizerBase, examples: dict[str, list[Example]], settings: CaptureSettings
) -> store.Index:
    """All that decides the bytes of the capture."""
    head = head_of(teacher.model)
    check_head(teacher.model, head)
    exact = settings.form == "exact"
    # A padded head has rows for tokens that do not exist; the exact form keeps them and leaves the choice to training.
    vocabulary = (
        head.weight_VD.shape[0] if exact else min(head.weight_VD.shape[0], 1 + max(tokenizer.get_vocab().values()))
    )
    if not exact and settings.top_k > vocabulary:
        raise ValueError(f"expected --top_k of at most {vocabulary} (the vocabulary), found {settings.top_k}; lower it")
    index: store.Index = {
        "format": store.FORMAT,
        "version": store.VERSION,
        "form": settings.form,
        "top_k": None if exact else settings.top_k,
        "hidden_size": head.weight_VD.shape[1],
        "vocabulary": vocabulary,
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "teacher": fingerprints.teacher_fingerprint(teacher.model),
        "tokenizer": fingerprints.tokenizer_fingerprint(tokenizer),
        "template": fingerprints.template_fingerprint(tokenizer),
        "batch_size": settings.batch_size,
        "shard_tokens": settings.shard_tokens,
        "head": store.describe_head(head) if exact else None,
        "splits": {
            split: fingerprints.data_fingerprint(samples) | {"shards": len(shards_of(samples, settings.shard_tokens))}
            for split, samples in examples.items()
        },
    }
    return index | {"bytes_per_token": bytes_per_token(store.layout_of(index))}


def _check_room(folder: Path, index: store.Index) -> None:
    """Say how large the capture will be, and refuse one that the disk has no room for."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    needed, free = max(0, estimated_bytes(index) - there), shutil.disk_usage(existing).free
    for split, data in index["splits"].items():
        print(
            f"{split}: {data['samples']:,} samples, {data['answer_tokens']:,} answer tokens of {data['tokens']:,} tokens"
        )
    print(
        f"{index['bytes_per_token']:,} bytes a token; {needed / 1e6:,.1f} MB to write, {free / 1e6:,.0f} MB free",
        flush=True,
    )
    if needed > 0.98 * free:
        raise ValueError(
            f"expected {needed / 1e6:,.1f} MB of free space for {str(folder)!r}, found {free / 1e6:,.1f} MB; choose another disk, "
            "fewer samples or the form top_k"
        )


@dataclass(frozen=True)
class _Run:
    """One run of the teacher over what is not captured yet."""

    teacher: Teacher
    index: store.Index
    key: str
    folder: Path
    pad_id: int

    def over(self, examples: dict[str, list[Example]]) -> CaptureReport:
        todo = [(path, samples) for path, samples in self._shards(examples) if not self._is_finished(path, samples)]
        rest = [example for _, samples in todo for example in samples]
        tokens, answer_tokens = sum(map(len, rest)), sum(map(fingerprints.num_answer_tokens, rest))
        started = time.perf_counter()
        if todo:
            with Bar(total=tokens, unit="tokens", unit_scale=True, desc="Capturing") as bar:
                for path, samples in todo:
                    self._write(path, samples, bar)
        return CaptureReport(
            bytes_per_token=self.index["bytes_per_token"],
            answer_tokens=sum(data["answer_tokens"] for data in self.index["splits"].values()),
            total_bytes=sum(file.stat().st_size for file in self.folder.iterdir()),
            captured_answer_tokens=answer_tokens,
            captured_tokens=tokens,
            seconds=time.perf_counter() - started,
        )

    def _shards(self, examples: dict[str, list[Example]]) -> Iterator[tuple[Path, list[Example]]]:
        for split, samples in examples.items():
            for number, shard in enumerate(shards_of(samples, self.index["shard_tokens"])):
                yield store.shard_path(self.folder, split, number), samples[shard.start : shard.stop]

    def _is_finished(self, path: Path, samples: list[Example]) -> bool:
        """Whether the shard is there and whole; a damaged one is made again."""
        if not path.exists():
            return False
        try:
            shard = store.Shard(path, self.key, store.layout_of(self.index))
            shard.verify()
        except store.DamagedError:
            print(f"{path} is damaged: captured again", flush=True)
            return False
        assert shard.positions == [example.index for example in samples]
        return True

    def _write(self, path: Path, samples: list[Example], bar: Bar) -> None:
        counts = [fingerprints.num_answer_tokens(example) for example in samples]
        columns = {
            name: torch.empty((sum(counts), width), dtype=dtype)
            for name, (dtype, width) in store.layout_of(self.index).items()
        }
        starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
        by_length = sorted(range(len(samples)), key=lambda number: (len(samples[number]), number))
        for first in range(0, len(samples), self.index["batch_size"]):
            chosen = by_length[first : first + self.index["batch_size"]]
            answers = self._answers([samples[number] for number in chosen])
            for name, column in answers.items():
                for number, rows in zip(chosen, column.cpu().split([counts[n] for n in chosen]), strict=True):
                    columns[name][starts[number] : starts[number + 1]] = rows
            bar.update(sum(len(samples[number]) for number in chosen))
        identities = [fingerprints.example_identity(example) for example in samples]
        store.write_shard(path, self.key, [example.index for example in samples], identities, counts, columns)

    @torch.no_grad()
    def _answers(self, samples: list[Example]) -> Columns:
        device = self.teacher.model.device
        batch = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in collate(samples, pad_id=self.pad_id).items()
        }
        hidden_NE = self.teacher.answer_hidden(batch)
        if self.index["form"] == "exact":
            return encode_exact(hidden_NE)
        return encode_top_k(hidden_NE, head_of(self.teacher.model), self.index["top_k"], self.index["vocabulary"])
