"""Shared by the studies: rows on disk that survive an interruption, and the page that shows them.

A study is a list of runs.  Every finished run is one line of `<out>.jsonl`, written at once or not at all, so that the same
command goes on where it stopped.  A row carries the settings it was made with; rows made otherwise are refused, not mixed.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.harness import report
from benchmarks.page import Row, write_page
from export.benchmark.report import machine as hardware
from models.loading.reference import load_model, load_tokenizer
from program.files import write_file


class Rows:
    """Finished runs of a study: one file, one JSON object a line, which names its `run`.

    Args:
        out: The file, whatever its suffix; made when the first run has finished.
        packages: Whose versions a row is kept with.
        settings: That all rows are made with.
    """

    def __init__(self, out: Path, packages: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> None:
        self.path, self.packages, self.settings = out.with_suffix(".jsonl"), packages, dict(settings or {})

    def all(self) -> dict[str, Row]:
        """The rows of all finished runs, by the run's name."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        return {row.pop("run"): row for row in map(json.loads, lines)}

    def find(self, name: str, settings: Mapping[str, Any]) -> Row | None:
        """The row of a run, or None if it has not finished.

        Raises:
            ValueError: It was made with other settings.
        """
        row = self.all().get(_run(name))
        wanted = json.loads(json.dumps({**self.settings, **settings}))  # as a file gives it back: lists for tuples
        if row is not None and row["settings"] != wanted:
            found = row["settings"]
            key = next(key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key))
            raise ValueError(
                f"expected {_run(name)} in {self.path} to be made with {key} = {wanted.get(key)!r}, found {found.get(key)!r}; "
                "repeat the command that made it, or choose another --out"
            )
        return row

    def write(self, name: str, row: Row) -> None:
        """Keep the row of a finished run."""
        rows = self.all() | {_run(name): row}
        write_text(self.path, "".join(json.dumps({"run": run} | rows[run]) + "\n" for run in rows))

    def find_or_make(self, name: str, settings: Mapping[str, Any], make: Callable[[], Row]) -> Row:
        """The row of a run: from its file, or made and kept, with its settings and the machine and packages it was made with."""
        row = self.find(name, settings)
        if row is None:
            tqdm.write(f"Run {name}")
            row = {**make(), "settings": {**self.settings, **settings}, "machine": machine(self.packages)}
            self.write(name, row)
        return row


def _run(name: str) -> str:
    """The name of a run in its file."""
    return name.replace(" ", "_").replace(",", "").replace("%", "percent")


def flat(rows: Sequence[Row]) -> list[Row]:
    """Rows without what is no single figure, for a report."""
    return [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    write_file(path, lambda path: path.write_text(text, encoding="utf-8"))


def fingerprint(folder: Path) -> str:
    """The first 16 digits of the SHA-256 over a model's weights: what a row depends on, wherever the folder lies."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def machine(packages: Sequence[str]) -> dict[str, str]:
    """Hardware and versions that a result belongs to."""
    here = hardware()
    found = {
        "device": here["gpu"] or here["processor"],
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    return found | {"python": platform.python_version(), **{package: version(package) for package in packages}}


def check_teacher(teacher: str) -> None:
    """Raise `FileNotFoundError` unless there is a model in this folder."""
    if not (Path(teacher) / "config.json").is_file():
        raise FileNotFoundError(
            f"expected a fine-tuned teacher at {teacher!r}, found none; make it with "
            "`python train.py fit --config benchmarks/distillation/teacher.yaml --run_dir runs/study/teacher`"
        )


def keep_layers(model: PreTrainedModel, count: int) -> None:
    """Keep so many decoder layers, evenly spread from the first on, in place; the configuration follows."""
    config, body = model.config, cast(Any, model.base_model)
    kept = [index * len(body.layers) // count for index in range(count)]
    body.layers = nn.ModuleList([body.layers[index] for index in kept])
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]


def write_half(teacher: str, folder: Path) -> None:
    """Half of the decoder layers of a teacher, evenly spread, and its tokenizer, as a Hugging Face folder."""
    check_teacher(teacher)
    model = load_model(teacher)
    keep_layers(model, model.config.num_hidden_layers // 2)
    model.save_pretrained(folder)
    load_tokenizer(teacher).save_pretrained(folder)


def finish(rows: Sequence[Row], packages: Sequence[str], out: Path, target: Path | None) -> None:
    """Report all rows, and make the tables and pictures of the page `<out>.md` again, if there is one."""
    report(flat(rows), {}, packages, target)
    page = out.with_suffix(".md")
    if page.is_file():
        write_page(page)
        print(f"wrote {page}")
