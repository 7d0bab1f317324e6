"""The files of a capture: `index.json`, `head.safetensors` (exact form) and shards `train-00000.safetensors`, ...

`index.json` says what the capture belongs to and how it is cut into shards; it is written first and never changed.  Its hash is
the `key` in every other file, so no file of another capture can slip in.  A shard holds whole samples in the order of the split:

| tensor                         | shape    | what                                                              |
|--------------------------------|----------|-------------------------------------------------------------------|
| `index`                        | (S,)     | the sample's position in its split, as in `Batch["index"]`        |
| `identity`                     | (S,)     | hash of its token ids and of which of them are answers            |
| `offset`                       | (S + 1,) | its rows are `offset[s]` to `offset[s + 1]`, one an answer token  |
| `checksum`                     | (S,)     | CRC-32 of its rows                                                |
| the columns of `forms.py`      | (N, ...) | the teacher's answers                                             |

Files are mapped into memory, never read as a whole.  Every read verifies the sample's checksum.

Legend: S samples, N answer tokens.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.losses.output_head import Head
from models.offline.fingerprints import combined, readable, tensor_bytes
from models.offline.forms import Columns, Layout, exact_layout, top_k_layout
from program.files import sweep, write_file

INDEX_FILE, HEAD_FILE = "index.json", "head.safetensors"
FORMAT, VERSION = "potstill-offline-teacher", 1
Index = dict[str, Any]
AGAIN = "remove this file and run the capture again: only this file is made again"


class DamagedError(ValueError):
    """A file of the capture is cut short or has other bytes than were written."""


def layout_of(index: Index) -> Layout:
    """The columns of a capture's shards."""
    if index["form"] == "exact":
        return exact_layout(index["hidden_size"])
    return top_k_layout(index["top_k"], index["vocabulary"])


def key_of(index: Index) -> str:
    """What binds shards to their index."""
    return combined([index])


def shard_path(folder: Path, split: str, number: int) -> Path:
    """The file of a split's shard."""
    return folder / f"{split}-{number:05d}.safetensors"


# Index ----------------------------------------------------------------------------------------------------------------


def read_index(folder: Path) -> Index:
    """The index of a capture.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not one that this version reads.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a captured teacher in {str(folder)!r}, found no {INDEX_FILE}; write one with `python -m models.offline`"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = (index["format"], index["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"expected the index of a captured teacher in {str(path)!r}, found another file") from error
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"expected {FORMAT!r} version {VERSION} in {str(path)!r}, found {found[0]!r} version {found[1]}; capture again "
            "into another folder"
        )
    return index


def begin(folder: Path, index: Index) -> None:
    """Write the index of a new capture, or make sure that the one in the folder is the same.

    Raises:
        ValueError: The folder holds another capture, or something else.
    """
    if (folder / INDEX_FILE).is_file():
        remedy = "continue it with its own settings, or choose another --output"
        check_same(read_index(folder), index, f"{str(folder)!r}", remedy)
        return
    sweep(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"expected a new or empty folder, or a capture to continue, found other files in {str(folder)!r}; choose another --output"
        )
    text = json.dumps(index, indent=2) + "\n"
    write_file(folder / INDEX_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def check_same(captured: Mapping[str, Any], now: Mapping[str, Any], where: str, remedy: str) -> None:
    """Raise `ValueError` for the first field that differs, with both values."""
    flat_captured, flat_now = _by_split(captured), _by_split(now)
    for name in flat_captured | flat_now:
        if flat_captured.get(name) != flat_now.get(name):
            raise ValueError(
                f"expected the {name} that the teacher in {where} was captured with, {readable(flat_captured.get(name))}, "
                f"found {readable(flat_now.get(name))}; {remedy}"
            )


def _by_split(index: Mapping[str, Any]) -> dict[str, Any]:
    """The index with one entry for each split's data."""
    rest = {name: value for name, value in index.items() if name != "splits"}
    return rest | {f"data of the split {split}": value for split, value in index.get("splits", {}).items()}


# Shards ---------------------------------------------------------------------------------------------------------------


def write_shard(
    path: Path, key: str, positions: Sequence[int], identities: Sequence[int], counts: Sequence[int], columns: Columns
) -> None:
    """Write one shard and put it in place when it is whole.

    Positions are those of the samples in their split, identities see `fingerprints.example_identity`, counts the answer
    tokens of each; columns hold the answers of all samples, one after the other.  `key` is the index's.
    """
    offset = torch.tensor([0, *counts]).cumsum(0)
    bounds = zip(offset[:-1].tolist(), offset[1:].tolist(), strict=True)
    tensors = {
        "index": torch.tensor(positions),
        "identity": torch.tensor(identities),
        "offset": offset,
        "checksum": torch.tensor([_checksum({n: c[start:stop] for n, c in columns.items()}) for start, stop in bounds]),
        **columns,
    }
    # One entry of metadata: their order in the file is not defined, and the same capture shall give the same bytes.
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata={"key": key}))


class Shard:
    """A shard on disk, mapped into memory: of the index with this key, with the columns of this layout.

    Raises:
        DamagedError: It is cut short or lacks a column.
        ValueError: It belongs to another capture.
    """

    def __init__(self, path: Path, key: str, layout: Layout) -> None:
        self.path = path
        try:
            file = safe_open(path, "pt")
            small = {name: file.get_tensor(name) for name in ("index", "identity", "offset", "checksum")}
            self._columns = {name: file.get_slice(name) for name in layout}
        except SafetensorError as error:
            raise DamagedError(
                f"expected a whole shard in {str(path)!r}, found a damaged one ({error}); {AGAIN}"
            ) from error
        found = (file.metadata() or {}).get("key", "none")
        if found != key:
            raise ValueError(
                f"expected a shard of the capture {key[:12]} in {str(path)!r}, found one of {found[:12]}; remove this file, or "
                "choose another --output"
            )
        self.positions: list[int] = small["index"].tolist()
        self.identities: list[int] = small["identity"].tolist()
        self.offsets: list[int] = small["offset"].tolist()
        self._checksums: list[int] = small["checksum"].tolist()

    def rows(self, sample: int) -> Columns:
        """The answers of a sample, as views of the file.

        Raises:
            DamagedError: The bytes are not those that were written.
        """
        start, stop = self.offsets[sample], self.offsets[sample + 1]
        rows = {name: column[start:stop] for name, column in self._columns.items()}
        found = _checksum(rows)
        if found != self._checksums[sample]:
            raise DamagedError(
                f"expected the checksum {self._checksums[sample]:08x} for sample {self.positions[sample]} in "
                f"{str(self.path)!r}, found {found:08x}: the file is damaged; {AGAIN}"
            )
        return rows

    def verify(self) -> None:
        """Read every sample once, see `rows`."""
        for sample in range(len(self.positions)):
            self.rows(sample)


# Head -----------------------------------------------------------------------------------------------------------------


def describe_head(head: Head) -> dict[str, Any]:
    """What the index says about the head."""
    return {
        "rows": head.weight_VD.shape[0],
        "bytes": sum(tensor.nbytes for tensor in _head_tensors(head).values()),
        "bias": head.bias_V is not None,
        "scale": head.scale,
        "soft_cap": head.soft_cap,
        "checksum": _checksum(_head_tensors(head)),
    }


def write_head(folder: Path, key: str, head: Head) -> None:
    """Store the head in its own floating point type."""
    write_file(folder / HEAD_FILE, lambda path: save_file(_head_tensors(head), path, metadata={"key": key}))


def read_head(folder: Path, index: Index) -> Head:
    """The stored head.

    Raises:
        DamagedError: It is missing, cut short or has other bytes than were written.
    """
    path, description = folder / HEAD_FILE, index["head"]
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, FileNotFoundError) as error:
        raise DamagedError(
            f"expected the teacher's head in {str(path)!r}, found none that loads ({error}); {AGAIN}"
        ) from error
    if _checksum(tensors) != description["checksum"]:
        raise DamagedError(f"expected the captured teacher's head in {str(path)!r}, found other bytes; {AGAIN}")
    return Head(tensors["weight"], tensors.get("bias"), description["scale"], description["soft_cap"])


def _head_tensors(head: Head) -> dict[str, Tensor]:
    tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


# Files ----------------------------------------------------------------------------------------------------------------


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensor_bytes(tensors[name]), checksum)
    return checksum
