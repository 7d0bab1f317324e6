"""Reading conversations from JSONL files, Parquet files and `datasets` names, each record with its place for errors."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from datamodules.chat import Conversation, conversation_from
from program.files import each_key_once

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")


def read_conversations(source: str, *, default_split: str, dataset_config: str | None = None) -> list[Conversation]:
    """Read every conversation of a .jsonl or .parquet file, or a `datasets` name or folder, with or without `:split`.

    A `datasets` source that names no split has the default one; `dataset_config` is for a name with several.

    Raises:
        FileNotFoundError: The file or data set does not exist.
        ValueError: A record is broken, has neither `messages` nor `prompt` and `response`, or there are no records.
    """
    suffix = Path(source).suffix
    if suffix in (*JSONL_SUFFIXES, ".parquet"):
        path = file_at(source)
        records = _read_parquet(path) if suffix == ".parquet" else read_jsonl(path)
    else:
        records = _read_dataset(source, default_split, dataset_config)
    conversations = [_conversation(record, place) for place, record in records]
    if not conversations:
        raise ValueError(f"expected at least one conversation in {source!r}, found none; fill it or choose another")
    return conversations


def file_at(source: str) -> Path:
    """The path of an existing file; raises `FileNotFoundError` if there is none."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"expected a file at {source!r}, found none; check the path")
    return path


def _conversation(record: dict[str, Any], place: str) -> Conversation:
    if isinstance(record.get("messages"), list):
        return conversation_from(record["messages"], place)
    if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
        prompt = {"role": "user", "content": record["prompt"]}
        return conversation_from([prompt, {"role": "assistant", "content": record["response"]}], place)
    fields = ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items()) or "no field"
    raise ValueError(
        f"expected a field `messages` (a list) or the fields `prompt` and `response` (texts), found {fields} in "
        f"{place}; rename or convert the fields"
    )


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place (file and line).

    Raises:
        ValueError: A line is not a JSON object in UTF-8, or has a key twice.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=each_key_once)
            except (ValueError, RecursionError) as error:  # broken JSON or broken UTF-8, or lists in lists without end
                raise ValueError(
                    f"expected one JSON object a line, found something unreadable in {place} ({error}); mend or remove "
                    "the line"
                ) from error
            if not isinstance(record, dict):
                found = type(record).__name__
                raise ValueError(
                    f"expected one JSON object a line, found a {found} in {place}; write each on its own line"
                )
            yield place, record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet  # slow to import

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"expected a Parquet file at {path}, found another format ({error}); write it again"
        ) from error
    records = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
    for number, record in enumerate(records, start=1):
        yield f"{path} row {number}", record


def _read_dataset(source: str, default_split: str, config: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets  # slow to import

    name, _, split = source.partition(":")
    try:
        records = datasets.load_dataset(name, config, split=split or default_split)
    except Exception as error:  # an unknown name, configuration or split; no network; an IndexError for no name at all
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"expected a .jsonl or .parquet file, or a `datasets` name with a split {split or default_split!r}, found "
            f"none at {source!r} ({reason}); check the path or the name, and write NAME:SPLIT for another split"
        ) from error
    for number, record in enumerate(records, start=1):
        yield f"{source} row {number}", record
