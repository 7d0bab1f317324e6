"""The teacher at training time: captured answers instead of a model.

`OfflineTeacher` answers for the samples it was captured on, and for nothing else: a sample with other tokens, which the student's
own answers are, is refused.  Where a `Teacher` computes, it reads, so memory holds the head of the exact form and the batch at hand.

Legend: N answer tokens, E the teacher's hidden size, V vocabulary, K kept tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from datamodules.base import ChatDataModule
from datamodules.collate import Batch
from models.losses.chunked import FullTargets, Targets, TopKTargets
from models.losses.output_head import Head, LazyLogits
from models.offline import fingerprints, store
from models.offline.forms import Columns, decode_top_k

PREFIX = "offline:"


def is_offline(reference: str) -> bool:
    """Whether a teacher's reference names a capture: `offline:FOLDER`."""
    return reference.startswith(PREFIX)


def open_offline_teacher(
    folder: str | Path, datamodule: ChatDataModule, splits: Sequence[str] | None = None
) -> "OfflineTeacher":
    """Open a capture and make sure that it was made for this data.

    Asked for will be `splits`; by default train, and val where the data has one.

    Raises:
        FileNotFoundError: There is no capture, or it is not finished.
        ValueError: Tokenizer, template or data of a split differ from the captured ones, or a file is damaged.
    """
    path = Path(str(folder).removeprefix(PREFIX)).expanduser()
    if splits is None:
        splits = ("train", "val") if datamodule.has_split("val") else ("train",)
    index = store.read_index(path)
    _check_splits(path, index, splits)
    captured = {name: index[name] for name in ("tokenizer", "template")}
    now = {
        "tokenizer": fingerprints.tokenizer_fingerprint(datamodule.tokenizer),
        "template": fingerprints.template_fingerprint(datamodule.tokenizer),
    }
    for split in splits:
        now_data = fingerprints.data_fingerprint(datamodule.examples(split))
        captured[f"data of the split {split}"] = {name: index["splits"][split][name] for name in now_data}
        now[f"data of the split {split}"] = now_data
    remedy = "train with what it was captured with (the data's seed and limits included), or capture again into another folder"
    store.check_same(captured, now, repr(str(path)), remedy)
    return OfflineTeacher(path, splits)


class OfflineTeacher:
    """The captured answers of a teacher; `open_offline_teacher` also checks that they belong to the data.

    Attributes:
        form: `exact` or `top_k`.
        top_k: Tokens kept for each answer token; None in the form exact.
        vocabulary: Tokens that the answers are about: the head's rows, or in the form top_k the tokenizer's ids.

    Raises:
        FileNotFoundError: There is no capture, or it is not finished.
        ValueError: A file is damaged or belongs to another capture.
    """

    def __init__(self, folder: Path, splits: Sequence[str]) -> None:
        self.folder = folder
        self.index = store.read_index(folder)
        _check_splits(folder, self.index, splits)
        self.form: str = self.index["form"]
        self.top_k: int | None = self.index["top_k"]
        self.vocabulary: int = self.index["vocabulary"]
        self.device = torch.device("cpu")
        self._head = store.read_head(folder, self.index) if self.form == "exact" else None
        self._places = {split: self._open(split) for split in splits}

    def to(self, device: torch.device) -> "OfflineTeacher":
        """Give answers on a device; returns itself."""
        self.device = device
        if self._head is not None:
            bias_V = None if self._head.bias_V is None else self._head.bias_V.to(device)
            self._head = replace(self._head, weight_VD=self._head.weight_VD.to(device), bias_V=bias_V)
        return self

    def targets(self, batch: Batch, split: str = "train") -> Targets:
        """What the losses compare the student with, in the order of `models.forward.answer_labels`.

        The samples are those of a split, as the loaders give them; a batch does not know which.

        Raises:
            ValueError: The split or a sample was not captured, has other tokens now, or its file is damaged.
        """
        if self.form == "exact":
            return FullTargets(self.answer_hidden(batch, split), self.head)
        log_p_NK, tokens_NK = decode_top_k(self._columns(batch, split))
        return TopKTargets(log_p_NK.to(self.device), tokens_NK.to(self.device))

    def answer_hidden(self, batch: Batch, split: str = "train") -> Tensor:
        """Final hidden states (N, E), rounded to bfloat16, in the head's type; exact form only."""
        head = self.head
        return self._columns(batch, split)["hidden"].to(self.device).to(head.weight_VD.dtype)

    def answer_logits(self, batch: Batch, split: str = "train") -> Tensor:
        """Logits (N, V) at the answer positions; exact form only."""
        return self.lazy_logits(batch, split)[:]

    def lazy_logits(self, batch: Batch, split: str = "train", vocabulary: int | None = None) -> LazyLogits:
        """The same, computed some rows at a time, over the first tokens of the vocabulary."""
        return LazyLogits(self.answer_hidden(batch, split), self._logits, vocabulary or self.vocabulary)

    def _logits(self, hidden_NE: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.head.logits(hidden_NE)

    @property
    def head(self) -> Head:
        """What turns hidden states into logits; exact form only."""
        if self._head is None:
            raise ValueError(
                f"expected a capture of the form exact for whole distributions, found {self.form} in {str(self.folder)!r}; "
                "capture with --form exact, or use a loss on the top tokens only"
            )
        return self._head

    def _open(self, split: str) -> dict[int, tuple[store.Shard, int]]:
        """Where each sample of a split is: its shard, and its number there."""
        key, layout = store.key_of(self.index), store.layout_of(self.index)
        number = self.index["splits"][split]["shards"]
        paths = [store.shard_path(self.folder, split, i) for i in range(number)]
        found = sum(path.exists() for path in paths)
        if found < number:
            raise FileNotFoundError(
                f"expected {number} files of the split {split} in {str(self.folder)!r}, found {found}; run the capture again, "
                "it continues where it stopped"
            )
        shards = [store.Shard(path, key, layout) for path in paths]
        return {position: (shard, i) for shard in shards for i, position in enumerate(shard.positions)}

    def _columns(self, batch: Batch, split: str) -> Columns:
        _check_splits(self.folder, self.index, [split], self._places)
        places, samples = self._places[split], []
        for position, identity in zip(batch["index"], fingerprints.row_identities(batch), strict=True):
            if position not in places:
                raise ValueError(
                    f"expected samples among the {len(places)} captured ones of the split {split}, found sample {position}; "
                    "capture the data that training uses"
                )
            shard, number = places[position]
            if shard.identities[number] != identity:
                raise ValueError(
                    f"expected sample {position} of the split {split} with the tokens it was captured with "
                    f"({shard.identities[number]:016x}), found other ones ({identity:016x}): a captured teacher knows no other "
                    "answers, the student's own included; use a live teacher for them"
                )
            samples.append(shard.rows(number))
        return {name: torch.cat([rows[name] for rows in samples]) for name in store.layout_of(self.index)}


def _check_splits(
    folder: Path, index: store.Index, splits: Sequence[str], available: Sequence[str] | dict | None = None
) -> None:
    available = list(index["splits"]) if available is None else list(available)
    if missing := [split for split in splits if split not in available]:
        raise ValueError(
            f"expected the split {missing[0]} in the captured teacher in {str(folder)!r}, found {', '.join(available)}; "
            f"capture it too (--splits {' '.join([*available, missing[0]])}) into another folder"
        )


def check_offline(reference: str, live: Mapping[str, bool]) -> None:
    """Raise `ValueError` if a captured teacher is asked about answers it has not seen, or for more than its answers.

    Nothing is checked where the reference names a model.  `live` holds settings that need a model, by name, and whether
    they are in use.
    """
    if not is_offline(reference):
        return
    for name in (name for name, used in live.items() if used):
        raise ValueError(
            f"expected a live teacher for model.{name}, found {reference!r}, which holds final answers to the data only; leave {name} "
            "out, or name the teacher's model"
        )
