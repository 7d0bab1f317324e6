"""Reads checkpoints: weights, structure and plain settings; never code, nor which model to fetch.

Settings in a checkpoint are data that somebody else may have written.  Each is taken over only if it fits the type that our module
declares for it, and an optimizer only if it is listed here; text without a fixed choice never is, as it could name a model.

torch stores a CRC-32 beside every tensor but never looks at it: `read_checkpoint` does.  It finds decay, not an attacker.
"""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from huggingface_hub import try_to_load_from_cache
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from models.hardware.low_precision import admit_optimizer_states
from models.loading.contents import check_finite
from models.loading.reference import PACKAGE_PREFIX
from models.structure.adapters import merge_adapters
from models.student import StudentModule
from program.screen import one_sentence

REFERENCES = ("student", "teacher", "trust_remote_code")
"""Settings that only the user's word may name: where a model comes from, and whether its code runs."""

OPTIMIZERS = frozenset(
    [f"torch.optim.{name}" for name in ("Adam", "AdamW", "Adamax", "Adagrad", "Adafactor", "NAdam", "RAdam", "RMSprop", "SGD", "Muon")]
    + [f"torchao.optim.{name}" for name in ("Adam8bit", "AdamW8bit", "Adam4bit", "AdamW4bit", "AdamFp8", "AdamWFp8")]
)  # fmt: skip
"""Optimizers that a checkpoint may name."""


# What readers raise for a file that is cut, damaged or something else.
_UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile)


def read_checkpoint(path: Path, *, settings_only: bool = False) -> dict[str, Any]:
    """Read a checkpoint of `train.py` to the CPU, without running anything of it.

    With `settings_only` it looks at no tensor, so that it takes no time; nor are tensors compared with their checksums
    then.

    Raises:
        FileNotFoundError: There is no file.
        ModuleNotFoundError: It holds optimizer states of torchao, which is not installed.
        ValueError: It is cut or damaged, holds more than plain data, or is not of a `StudentModule`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {str(path)!r}, found no file; check the path")
    try:
        _check_records(path, skip_tensors=settings_only)
        admit_optimizer_states(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=settings_only or None)
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"expected a checkpoint at {str(path)!r}, found a file that does not load as one ({reason}); take an earlier one, or copy "
            "it again"
        ) from error
    kinds = {"edits": list, "hyper_parameters": Mapping, "state_dict": Mapping}
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), kinds[key]) for key in kinds):
        raise ValueError(
            f"expected a checkpoint written by train.py at {str(path)!r}, found one without a student's structure; give the .ckpt file of "
            "a run, or a Hugging Face folder"
        )
    tensors = all(isinstance(weight, torch.Tensor) for weight in checkpoint["state_dict"].values())
    named = all(isinstance(edit, dict) and isinstance(edit.get("op"), str) for edit in checkpoint["edits"])
    if not tensors or not named:
        what = "edits with a name each" if tensors else "weights that are tensors"
        raise ValueError(
            f"expected {what} in the checkpoint {str(path)!r}, found others; take an earlier one, or copy it again"
        )
    return checkpoint


def _check_records(path: Path, *, skip_tensors: bool) -> None:
    """Compare every record of torch's archive with its checksum.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: A record differs, or the file is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if skip_tensors and "/data/" in record.filename:
                continue
            try:
                with archive.open(record) as file:
                    while file.read(2**22):
                        pass
            except zipfile.BadZipFile as error:
                raise ValueError(f"{record.filename} differs from its checksum: the file is damaged") from error


def plain_settings(kind: type[StudentModule], saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a checkpoint may set, and the names of what it says beyond that.

    `kind` is the module that the user has named, `saved` the checkpoint's `hyper_parameters`.  Kept are settings that
    fit the types that the module declares, without `REFERENCES`.
    """
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, StudentModule) and "__init__" in vars(base):
            hints |= get_type_hints(base.__init__)
    hints = {name: hint for name, hint in hints.items() if name not in ("return", "kwargs", *REFERENCES)}
    kept = {name: value for name, value in saved.items() if name in hints and _fits(value, hints[name])}
    refused = sorted(str(name) for name in saved.keys() - kept.keys() - {*REFERENCES, "_class_path", "_instantiator"})
    return kept, refused


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data is of a type; settings in a dataclass and an optimizer are dicts in a checkpoint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint == OptimizerCallable:
        return _is_optimizer(value)
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return type(value) in map(type, arguments) and value in arguments
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        names = {field.name for field in fields(hint)}
        return isinstance(value, dict) and all(
            key in names and _fits(entry, hints[key]) for key, entry in value.items()
        )
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_key(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(entry, arguments[0]) for entry in value)
    if hint is float:
        return type(value) in (float, int)
    return hint in (int, bool, NoneType) and type(value) is hint


def _is_key(key: Any, hint: Any) -> bool:
    """Whether a dict's key is of a type; the command line saves numbers as text."""
    return type(key) is hint or (hint is int and isinstance(key, str) and key.isdecimal())


def _is_optimizer(value: Any) -> bool:
    """A listed class, with numbers, words and lists of numbers; a word with a dot could name something to import."""
    if not isinstance(value, dict) or not value.keys() <= {"class_path", "init_args"}:
        return False
    name, settings = value.get("class_path"), value.get("init_args", {})
    return (
        isinstance(name, str)
        and name in OPTIMIZERS
        and isinstance(settings, dict)
        and all(isinstance(key, str) and key.isidentifier() for key in settings)
        and all(
            type(entry) in (int, float, bool, NoneType) or (isinstance(entry, str) and entry.isidentifier())
            for setting in settings.values()
            for entry in (setting if isinstance(setting, list | tuple) else [setting])
        )
    )


def load_student_checkpoint(path: Path, student: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student of a Lightning checkpoint with its structure, adapters merged, in evaluation mode, and its tokenizer.

    All weights are the checkpoint's.  Configuration and tokenizer come from the model that it was trained from: what the user
    names, else what the checkpoint names, as long as that is on this machine already (or is a packaged model, whose hash we know).

    Raises:
        FileNotFoundError: There is no such file or model.
        ValueError: The file is not a checkpoint of a `StudentModule`, or would have a model fetched from a hub.
    """
    checkpoint = read_checkpoint(path)
    if student is None:
        student = _student_of(path, checkpoint["hyper_parameters"].get("student"))
        rank_zero_info(
            f"Configuration and tokenizer come from {student!r}, which the checkpoint names; --student names another"
        )
    module = StudentModule(student)
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:  # names or shapes
        raise ValueError(
            f"expected the weights of {student!r} with its edits in the checkpoint {str(path)!r}, found others "
            f"({one_sentence(str(error))[:200]}); name the model that it was trained from with --student"
        ) from error
    check_finite(module.student, f"the checkpoint {str(path)!r}")
    return merge_adapters(module.student.eval()), module.tokenizer


def _student_of(path: Path, reference: Any) -> str:
    """The model that a checkpoint names, unless a download would follow that nobody has asked for."""
    if not isinstance(reference, str):
        raise ValueError(
            f"expected the student's model among the settings in {str(path)!r}, found none; name it with --student"
        )
    here = reference.startswith(PACKAGE_PREFIX) or Path(reference).expanduser().exists()
    if (
        not here and reference.count("/") < 2 and not reference.startswith((".", "~", "/"))
    ):  # a hub id: no path, see models/loading/reference.py
        here = isinstance(try_to_load_from_cache(reference, CONFIG_NAME), str)
        if not here:
            raise ValueError(
                f"expected a model on this machine in the checkpoint {str(path)!r}, found the hub id {reference!r}, which was never "
                f"downloaded here; add --student {reference} if you trust it, or name a folder"
            )
    return reference
