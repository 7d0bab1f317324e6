"""Pairs know nothing of the future: histories, splits by time, parts of whole members, and figures."""

from itertools import pairwise

import pytest

from datamodules.movielens_files import Rating, read_ratings
from datamodules.movielens_ranking import Pair, draw_members, draw_pairs, figures_of, pairs_of, split_by_time
from tests.helpers.tiny_movielens import tiny_movielens


@pytest.fixture(scope="module", params=range(5))
def ratings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Rating]:
    return read_ratings(tiny_movielens(tmp_path_factory.mktemp("films"), seed=request.param))


@pytest.mark.parametrize("history", [0, 1, 3, 100])
def test_history_is_exactly_the_latest_earlier_seconds(ratings: list[Rating], history: int) -> None:
    for pair in pairs_of(ratings, history):
        earlier = [r for r in ratings if r.member == pair.rating.member and r.time < pair.rating.time]
        assert list(pair.history) == earlier[max(0, len(earlier) - history) :]
        assert pair.rating.film not in {r.film for r in pair.history}


def test_ratings_of_the_same_second_share_their_history(ratings: list[Rating]) -> None:
    pairs = pairs_of(ratings, 100)
    assert [pair.rating for pair in pairs] == ratings
    ties = [(a, b) for a in pairs for b in pairs if a is not b and _moment(a) == _moment(b)]
    assert ties
    assert all(a.history == b.history for a, b in ties)


@pytest.mark.parametrize("fractions", [(0.1, 0.1), (0.25, 0.4), (0.0, 0.2), (0.3, 0.0)])
def test_splits_follow_each_other_in_time(ratings: list[Rating], fractions: tuple[float, float]) -> None:
    pairs = pairs_of(ratings, 3)
    splits = split_by_time(pairs, *fractions)
    assert [pair for split in splits.values() for pair in split] == pairs
    parts = [part for part in splits.values() if part]
    assert len(parts) == 3 - fractions.count(0.0)
    for older, newer in pairwise(parts):
        assert max(pair.rating.time for pair in older) < min(pair.rating.time for pair in newer)
    for split, fraction in zip(("val", "test"), fractions, strict=True):
        assert abs(len(splits[split]) - fraction * len(pairs)) <= 8  # ratings of one second stay together


def test_all_in_one_second_cannot_be_split(ratings: list[Rating]) -> None:
    same = [Pair(Rating(r.member, r.film, r.stars, 5), ()) for r in ratings]
    assert [len(part) for part in split_by_time(same, 0.1, 0.1).values()] == [0, 0, len(same)]


def test_random_pairs(ratings: list[Rating]) -> None:
    pairs = pairs_of(ratings, 3)
    drawn = draw_pairs(pairs, 20, seed=1)
    assert len(drawn) == 20 and drawn == [pair for pair in pairs if pair in drawn]
    assert draw_pairs(pairs, 20, seed=1) == drawn != draw_pairs(pairs, 20, seed=2)
    assert draw_pairs(pairs, 1000, seed=1) == pairs


def test_members_come_whole(ratings: list[Rating]) -> None:
    pairs = pairs_of(ratings, 3)
    drawn = draw_members(pairs, 15, seed=1)
    members = {pair.rating.member for pair in drawn}
    assert drawn == [pair for pair in pairs if pair.rating.member in members]
    assert 15 <= len(drawn) < 15 + 10
    assert draw_members(pairs, 15, seed=1) == drawn
    assert len({tuple(draw_members(pairs, 15, seed=seed)) for seed in range(9)}) > 1
    assert draw_members(pairs, 1000, seed=1) == pairs
    assert draw_members([], 10, seed=1) == []


def test_figures(ratings: list[Rating]) -> None:
    splits = split_by_time(pairs_of(ratings, 3), 0.2, 0.2)
    figures = figures_of(splits)
    test = figures["test"]
    assert test["pairs"] == len(splits["test"])
    assert test["liked"] * test["pairs"] == pytest.approx(sum(pair.rating.stars >= 4 for pair in splits["test"]))
    trained = {pair.rating.member.number for pair in splits["train"]}
    tested = {pair.rating.member.number for pair in splits["test"]}
    assert (test["members"], test["new_members"]) == (len(tested), len(tested - trained))
    assert test["new_members"] > 0  # members begin at different times
    assert figures["train"]["new_members"] == figures["train"]["new_films"] == 0
    firsts = {member: min(r.time for r in ratings if r.member == member) for member in {r.member for r in ratings}}
    num_first = sum(rating.time == firsts[rating.member] for rating in ratings)
    assert sum(part["no_history"] for part in figures.values()) == num_first >= 8
    assert figures_of({"train": [], "val": [], "test": []})["val"]["liked"] == 0


def _moment(pair: Pair) -> tuple[str, int]:
    return pair.rating.member.number, pair.rating.time
