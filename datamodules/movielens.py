"""Labels from MovieLens' ratings without leaking the future: pairs of a member and a film, split by time."""

import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from datamodules.movielens_files import Member, Rating

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
    """Every rating with the member's latest ratings of earlier seconds, at most `history`; oldest first, as `ratings` are."""
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
    """`train`, `val` and `test`: the oldest pairs, newer ones, the newest; a second that would be cut goes to the later split."""
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
    """The pairs of random members until there are at least `size`, in the old order.

    Members come whole: a ranking within a member needs all that they rated.
    """
    counts = Counter(pair.rating.member.number for pair in pairs)
    members = sorted(counts)
    random.Random(seed).shuffle(members)
    totals = list(accumulate(counts[member] for member in members))
    chosen = set(members[: bisect_left(totals, size) + 1])
    return [pair for pair in pairs if pair.rating.member.number in chosen]


def figures_of(splits: dict[str, list[Pair]]) -> dict[str, dict[str, float]]:
    """For each split: `pairs`, `members`, `films`, the share of pairs `liked`, how many pairs have `no_history`, and how many
    members and films do not occur in training (`new_members`, `new_films`).
    """
    known_members = {pair.rating.member for pair in splits["train"]}
    known_films = {pair.rating.film for pair in splits["train"]}
    figures: dict[str, dict[str, float]] = {}
    for split, pairs in splits.items():
        members, films = {pair.rating.member for pair in pairs}, {pair.rating.film for pair in pairs}
        figures[split] = {
            "pairs": len(pairs),
            "members": len(members),
            "films": len(films),
            "liked": sum(pair.liked for pair in pairs) / max(len(pairs), 1),
            "no_history": sum(not pair.history for pair in pairs),
            "new_members": len(members - known_members),
            "new_films": len(films - known_films),
        }
    return figures
