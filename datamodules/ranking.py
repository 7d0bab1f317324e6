"""Ranking and classification: a prompt, and one label token as the answer.

See `Ranking` for the records, and `datamodules/label_prompts.py` for how prefix and prompt become tokens.

Shapes: B batch, C classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor

from datamodules.base import ChatDataModule
from datamodules.chat import Conversation, Example
from datamodules.collate import Batch, collate, pad_id_of
from datamodules.files import file_at, read_jsonl
from datamodules.label_prompts import encode_prompts, frame_of, label_token_ids, message_of


@dataclass(frozen=True)
class Candidate(Conversation):
    """A prompt with its target distribution over the classes; `messages` hold the same as text."""

    prefix: str
    question: str
    weights: tuple[float, ...]
    user: str | None


@dataclass(frozen=True)
class RankingExample(Example):
    """A tokenized candidate: the prompt, and the token of its most probable label."""

    prefix_length: int
    weights: tuple[float, ...]
    user: str | None


class RankingBatch(Batch):
    """What the loaders of ranking data yield: `labels` are -100 except on the one label token."""

    class_B: Tensor  # long: the class of the label, or the most probable one of a graded row
    weights_BC: Tensor  # float32: the target distribution
    user: list[str | None]  # whose candidate it is, for figures by user
    prefix_length: list[int]  # so many first tokens are the same in all prompts with the same prefix


class RankingData(ChatDataModule):
    """Candidates to rank; a subclass provides them in `load_split` as a list of `Candidate`.

    Args:
        tokenizer: Model reference whose tokenizer and chat template are used; the command line sets it to the student.
        labels: The classes in order; each has to be one token of the tokenizer.
        **kwargs: As for `ChatDataModule`.
    """

    def __init__(self, tokenizer: str, *, labels: Sequence[str] = ("no", "yes"), **kwargs: Any) -> None:
        super().__init__(tokenizer, supervise_all_turns=False, **kwargs)
        self.labels = tuple(labels)

    @cached_property
    def label_token_ids(self) -> Tensor:
        """The token of each class, shape (C,)."""
        return torch.tensor(label_token_ids(self.tokenizer, self.labels, self.system_prompt))

    @property
    def collate_fn(self) -> Callable[[Sequence[Example]], Batch]:
        """Makes a `RankingBatch` of examples."""
        return partial(collate_ranking, pad_id=pad_id_of(self.tokenizer))  # type: ignore[arg-type]

    def tokenize(self, conversations: list[Conversation]) -> list[Example]:
        """One `RankingExample` for each candidate."""
        candidates = cast(list[Candidate], conversations)
        tokens = self.label_token_ids.tolist()
        pairs = [(candidate.prefix, candidate.question) for candidate in candidates]
        prompts = encode_prompts(self.tokenizer, frame_of(self.tokenizer, self.system_prompt), pairs)
        return [
            RankingExample(
                input_ids=torch.tensor([*prompt.ids, tokens[most_probable(candidate.weights)]], dtype=torch.int32),
                answer_spans=((len(prompt.ids), len(prompt.ids) + 1),),
                prompt=candidate.prompt[0]["content"],
                answer=candidate.answer,
                index=index,
                prefix_length=prompt.prefix_length,
                weights=candidate.weights,
                user=candidate.user,
            )
            for index, (candidate, prompt) in enumerate(zip(candidates, prompts, strict=True))
        ]

    def _encode(self, split: str) -> list[Example]:
        examples = super()._encode(split)
        if split == "train":
            shares = torch.tensor([cast(RankingExample, example).weights for example in examples]).sum(0).tolist()
            if missing := [label for label, share in zip(self.labels, shares, strict=True) if not share]:
                raise ValueError(
                    f"expected every label among the {len(examples)} training samples, found none with "
                    f"{' or '.join(map(repr, missing))}; add some, or remove the label from `labels`"
                )
        return examples


class Ranking(RankingData):
    """Your own candidates from JSONL files.

    A line is `{"prompt": text, "label": ...}` or, with soft targets, `{"prompt": text, "labels": {label: weight}}`. A label is
    a text of `labels` or its position there, counted from 0. Optional: `prefix`, a text before the prompt that many lines share,
    and `user`, for figures by user.

    Args:
        tokenizer: Model reference whose tokenizer and chat template are used; the command line sets it to the student.
        train: A JSONL file.
        val: The same for validation (null: none).
        test: The same for test and prediction (null: none).
        **kwargs: As for `RankingData`.
    """

    def __init__(
        self, tokenizer: str, train: str, *, val: str | None = None, test: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        self.sources: dict[str, str | None] = {"train": train, "val": val, "test": test}

    def has_split(self, split: str) -> bool:
        """Whether the split was configured."""
        return self.sources[split] is not None

    def load_split(self, split: str) -> list[Conversation]:
        """The candidates of a split, in the order of the file."""
        source = self.sources[split]
        if source is None:
            raise ValueError(f"expected {split} data, found none; set `{split}` to a .jsonl file")
        rows = [candidate_from(record, self.labels, place) for place, record in read_jsonl(file_at(source))]
        if not rows:
            raise ValueError(f"expected at least one row in {source!r}, found none; fill it or choose another")
        return [*rows]


def candidate_from(record: dict[str, Any], labels: Sequence[str], place: str) -> Candidate:
    """Make a candidate of a row, see `Ranking`; raises `ValueError`, naming its `place`, if it breaks a rule."""
    fields = ", ".join(record) or "no field"
    prompt, prefix, user = (record.get(name) for name in ("prompt", "prefix", "user"))
    if not isinstance(prompt, str) or not prompt.strip():
        found = f"{prompt!r:.60}" if "prompt" in record else fields
        raise ValueError(f"expected a field `prompt` with a text, found {found} in {place}; write what is to be judged")
    if prefix is not None and not isinstance(prefix, str):
        raise ValueError(f"expected `prefix` as a text, found {prefix!r:.60} in {place}; convert it, or leave it out")
    if user is not None and (isinstance(user, bool) or not isinstance(user, str | int)):
        raise ValueError(f"expected `user` as a text or a whole number, found {user!r:.60} in {place}; convert it")
    if ("label" in record) == ("labels" in record):
        found = "both" if "label" in record else fields
        raise ValueError(f"expected either `label` or `labels`, found {found} in {place}; give each row one of them")
    if "labels" in record:
        weights = _graded(record["labels"], labels, place)
    else:
        label = _class_of(record["label"], labels, place)
        weights = tuple(float(index == label) for index in range(len(labels)))
    return candidate_of(prefix or "", prompt, weights, labels, None if user is None else str(user), place)


def candidate_of(
    prefix: str, prompt: str, weights: tuple[float, ...], labels: Sequence[str], user: str | None, source: str
) -> Candidate:
    """A candidate with its messages."""
    messages = [
        {"role": "user", "content": message_of(prefix, prompt)},
        {"role": "assistant", "content": labels[most_probable(weights)]},
    ]
    return Candidate(messages, source, prefix, prompt, weights, user)


def most_probable(weights: Sequence[float]) -> int:
    """The class with the greatest weight; the first of several."""
    return max(range(len(weights)), key=weights.__getitem__)


def collate_ranking(examples: Sequence[RankingExample], *, pad_id: int) -> RankingBatch:
    """A padded batch as from `collate`, with what ranking adds."""
    return RankingBatch(
        **collate(examples, pad_id=pad_id),
        class_B=torch.tensor([most_probable(example.weights) for example in examples]),
        weights_BC=torch.tensor([example.weights for example in examples]),
        user=[example.user for example in examples],
        prefix_length=[example.prefix_length for example in examples],
    )


def _class_of(label: Any, labels: Sequence[str], place: str) -> int:
    """The position of a label, which is a text or already the position."""
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    if isinstance(label, int) and not isinstance(label, bool):
        if str(label) in labels and labels.index(str(label)) != label:
            raise ValueError(
                f"expected a label that means one thing only, found the number {label} in {place}, which is a label but not "
                f'the position of it in {list(labels)}; write "{label}" in quotes'
            )
        if 0 <= label < len(labels):
            return label
    raise ValueError(
        f"expected a label among {list(labels)} or its position from 0, found {label!r:.60} in {place}; correct the row, "
        "or add the label to `labels`"
    )


def _graded(graded: Any, labels: Sequence[str], place: str) -> tuple[float, ...]:
    """The weights of `{label: weight}` in order and with sum 1; what is left out weighs 0."""
    if not isinstance(graded, dict) or (unknown := [label for label in graded if label not in labels]):
        found = repr(unknown[0]) if isinstance(graded, dict) else f"{graded!r:.60}"
        raise ValueError(
            f"expected `labels` as weights of labels among {list(labels)}, found {found} in {place}; correct the row, or add "
            "the label to the data module's `labels`"
        )
    weights = [graded.get(label, 0) for label in labels]
    numbers = all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in weights)
    total = sum(weights) if numbers else math.nan
    if not 0 < total < math.inf or min(weights) < 0:
        raise ValueError(
            f"expected weights of labels at least 0 and not all 0, found {graded!r:.80} in {place}; correct them"
        )
    return tuple(weight / total for weight in weights)
