"""Your own conversations: JSONL, Parquet or a `datasets` name.

One record has `messages` (a list of `{"role": ..., "content": ...}`) or `prompt` and `response`. Samples are batched
by length, not packed, which would need an attention mask per sample in every model and in the rollout.
"""

import random
from functools import cached_property
from typing import Annotated, Any

from lightning.pytorch.utilities import rank_zero_info

from datamodules.base import ChatDataModule, exact_match, most_common_share
from datamodules.chat import Conversation
from datamodules.collate import Batch
from datamodules.files import read_conversations
from program.ranges import Between, check_arguments

DEFAULT_SPLITS: dict[str, str] = {"train": "train", "val": "validation", "test": "test"}


class Conversations(ChatDataModule):
    """Conversations from files or from the `datasets` library.

    Args:
        tokenizer: Model reference whose tokenizer and chat template are used; the command line sets it to the student.
        train: A .jsonl or .parquet file, or a `datasets` name with an optional split (`owner/name:train`).
        val: The same for validation (null: a part of `train` is held out).
        test: The same for test and prediction.
        val_fraction: Share of `train` that is held out if `val` is not given; 0 means no validation.
        dataset_config: Configuration of a `datasets` name that has several.
        score_exact_match: Score completions by exact match with the gold answer, for data with short answers.
        **kwargs: As for `ChatDataModule`.

    Raises:
        ValueError: `val_fraction` is outside 0..1.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str,
        *,
        val: str | None = None,
        test: str | None = None,
        val_fraction: Annotated[float, Between(0, 1, (1,), "write the share to hold out, such as 0.05")] = 0.05,
        dataset_config: str | None = None,
        score_exact_match: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        check_arguments(Conversations.__init__, locals(), "data.")
        self.sources: dict[str, str | None] = {"train": train, "val": val, "test": test}
        self.val_fraction = val_fraction
        self.dataset_config = dataset_config
        self.score_exact_match = score_exact_match
        #: Held-out samples that were removed because their prompt occurs in training.
        self.num_duplicates_removed = 0

    @property
    def has_score(self) -> bool:
        """Only where exact match was asked for."""
        return self.score_exact_match

    def has_split(self, split: str) -> bool:
        """Whether the split was configured."""
        return self.sources[split] is not None or (split == "val" and self.val_fraction > 0)

    def load_split(self, split: str) -> list[Conversation]:
        """The conversations of a split, in the order of the file."""
        if not self.has_split(split):
            raise ValueError(
                f"expected {split} data, found none; set `{split}` to a .jsonl or .parquet file or a `datasets` name"
                + (", or val_fraction to more than 0" if split == "val" else "")
            )
        if self.sources["val"] is None and self.val_fraction > 0 and split != "test":
            train, val = self._train_and_held_out
            return train if split == "train" else val
        return self._read(split)

    def score(self, predictions: list[str], batch: Batch, split: str) -> list[float] | None:
        """Exact match if `score_exact_match` is set; else `None`."""
        return exact_match(predictions, batch["answers"]) if self.score_exact_match else None

    def constant_answer_score(self, split: str) -> float | None:
        """The exact match of the most common answer if `score_exact_match` is set; else `None`."""
        return most_common_share([e.answer for e in self.examples(split)]) if self.score_exact_match else None

    def _read(self, split: str) -> list[Conversation]:
        source = self.sources[split]
        assert source is not None
        return read_conversations(source, default_split=DEFAULT_SPLITS[split], dataset_config=self.dataset_config)

    @cached_property
    def _train_and_held_out(self) -> tuple[list[Conversation], list[Conversation]]:
        """Hold out a seeded sample; its members whose prompt occurs in the rest would not be held out at all."""
        everything = self._read("train")
        num_held_out = max(1, round(len(everything) * self.val_fraction))
        chosen = set(random.Random(self.seed).sample(range(len(everything)), num_held_out))
        train = [conversation for i, conversation in enumerate(everything) if i not in chosen]
        seen = {_prompt_key(conversation) for conversation in train}
        held_out = [everything[i] for i in sorted(chosen)]
        val = [conversation for conversation in held_out if _prompt_key(conversation) not in seen]
        self.num_duplicates_removed = len(held_out) - len(val)
        if self.num_duplicates_removed:
            rank_zero_info(
                f"val: of {len(held_out)} held-out samples, {self.num_duplicates_removed} were removed because their "
                "prompt occurs in training"
            )
        if not train or not val:
            raise ValueError(
                f"expected training samples and held-out samples with other prompts, found {len(everything)} samples, "
                f"of which {len(train)} are left for training and {len(val)} held out ({self.num_duplicates_removed} "
                "removed as duplicates); add samples, give `val` a file of its own, or set val_fraction to 0"
            )
        return train, val


def _prompt_key(conversation: Conversation) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"].strip()) for message in conversation.prompt)
