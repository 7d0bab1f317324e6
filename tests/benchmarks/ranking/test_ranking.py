"""The ranking benchmark on a tiny model and a tiny MovieLens: what is compared, counted, written and refused."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.ranking import __main__ as ranking
from benchmarks.ranking.films import draw_members, draw_pairs, shuffled_films, usual_prefix
from benchmarks.ranking.load import PrefixCounter
from benchmarks.ranking.ways import RUNTIMES, agreement, open_session, transformers_loop, ways
from datamodules.ranking import Candidate, candidate_of
from tests.helpers.tiny import byte_tokenizer, tiny_folder, tiny_model
from tests.helpers.tiny_movielens import tiny_movielens

LABELS = ("n", "y")
PREFIX = "Member 7, 31 years, likes: Alien (1979), Brazil (1985)"
FILMS = [
    "Toy Story",
    "Heat",
    "A much longer title, The Return, Part 3",
    "Up",
    "?",
    "Babe",
    "Fargo",
    "Ran",
    "Big",
    "Jaws",
]


# Ways ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_ways_give_the_scores_of_the_plain_loop(runtime: str) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    expected = transformers_loop(model, tokenizer, LABELS)(PREFIX, FILMS)
    assert expected.shape == (len(FILMS), 2) and expected.std() > 0.01
    for score in ways(open_session(runtime, model, 1), tokenizer, LABELS).values():
        for _ in range(2):
            torch.testing.assert_close(score(PREFIX, FILMS), expected, atol=1e-4, rtol=0)


def test_a_hot_prefix_is_not_computed_a_cold_one_is_once_and_from_scratch_all_is() -> None:
    session = PrefixCounter(open_session("torch", tiny_model(), 1))
    found = ways(session, byte_tokenizer(), LABELS)
    found["hot"](PREFIX, FILMS)

    def computed(way: str) -> int:
        session.computed = 0
        found[way](PREFIX, FILMS)
        return session.computed

    assert computed("hot") == 0
    assert computed("cold") == computed("cold") == 1
    assert computed("hot") == 0
    assert computed("scratch") == 2  # batches of 8 and 2


# Films ---------------------------------------------------------------------------------------------------------------


def candidates() -> list[Candidate]:
    """Three members, oldest first."""
    texts = [("a1", "Heat", "1"), ("b", "Heat", "2"), ("a22", "Up", "1"), ("a22", "Ran", "1"), ("cccc", "Up", "3")]
    return [candidate_of(prefix, film, (0.0, 1.0), LABELS, user, "") for prefix, film, user in texts]


def test_what_is_drawn_comes_from_the_candidates() -> None:
    found = candidates()
    assert usual_prefix(found) == "a22"
    assert sorted(shuffled_films(found, 3)) == ["Heat", "Ran", "Up"]
    assert sorted(draw_members(found, 9)) == ["a22", "b", "cccc"]
    assert len(draw_members(found, 2)) == 2
    films = {"a1": ["Heat"], "b": ["Heat"], "a22": ["Up", "Ran"], "cccc": ["Up"]}
    assert draw_pairs(found, 9) == films
    for number in range(1, 5):
        drawn = draw_pairs(found, number)
        assert sum(map(len, drawn.values())) == number
        assert all(films[prefix][: len(drawn[prefix])] == drawn[prefix] for prefix in drawn)
    with pytest.raises(ValueError, match="expected at most 3 candidates, the films of the test split, found 4"):
        shuffled_films(found, 4)


# Figures -------------------------------------------------------------------------------------------------------------


def test_agreement_is_the_largest_difference_of_any_pair() -> None:
    def shifted(shift: float, film: str) -> ranking.Score:
        def score(prefix: str, films: Sequence[str]) -> torch.Tensor:
            return torch.tensor([[-1.0, -2.0 + (shift if (prefix, name) == ("q", film) else 0)] for name in films])

        return score

    scores = {
        "first": shifted(0, ""),
        "above": shifted(0.25, "Up"),
        "below": shifted(-0.5, "Up"),
        "elsewhere": shifted(0.125, "Ran"),
    }
    assert agreement(scores, {"p": ["Heat"], "q": ["Ran", "Up"]}) == {
        "pairs": 3,
        "compared_with": "first",
        "above": 0.25,
        "below": 0.5,
        "elsewhere": 0.125,
        "max_difference": 0.75,
    }


def test_sides_take_turns_and_more_candidates_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "RATIO_AT", 2)
    monkeypatch.setattr(ranking, "WARM_UP", 3)
    called: list[tuple[str, int]] = []

    def side(name: str) -> ranking.Score:
        def score(prefix: str, films: Sequence[str]) -> torch.Tensor:
            called.append((name, len(films)))
            return torch.empty(len(films), 2)

        return score

    sides = {("torch", "hot"): side("hot"), ("torch", "scratch"): side("scratch")}
    rows = ranking.measure(sides, "p", FILMS, [1, 2, 4, 9], 3)
    in_turns = [(name, number) for number in [3, 1, 2, 4, 9, 1, 2, 1, 2] for name in ("hot", "scratch")]
    assert called == in_turns
    counted = {(row["way"], row["candidates"]): row["repetitions"] for row in rows}
    assert counted == {(way, n): times for way in ("hot", "scratch") for n, times in ((1, 3), (2, 3), (4, 1), (9, 1))}
    for row in rows:
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["candidates_per_second"] == pytest.approx(row["candidates"] / row["median_s"])


def test_ratios_are_those_of_50_candidates_and_the_worst_is_named() -> None:
    seconds = {
        ("torch", "hot"): 2.0,
        ("torch", "cold"): 3.0,
        ("torch", "scratch"): 20.0,
        ("onnx", "hot"): 3.0,
        ("onnx", "cold"): 6.0,
        ("onnx", "scratch"): 10.0,
        ("transformers", "loop"): 40.0,
    }
    rows = [
        {"runtime": runtime, "way": way, "candidates": number, "median_s": median if number == 50 else 1.0}
        for number in (1, 50, 100)
        for (runtime, way), median in seconds.items()
    ]
    assert ranking.ratios_of(rows) == {
        "hot_prefix_50": 0.3,
        "hot_prefix_50_torch": 0.1,
        "cold_prefix_50_torch": 0.15,
        "hot_prefix_50_torch_over_loop": 0.05,
        "hot_prefix_50_onnx": 0.3,
        "cold_prefix_50_onnx": 0.6,
        "hot_prefix_50_onnx_over_loop": 0.075,
    }


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranking")
    tiny_folder(folder / "model", max_position_embeddings=1024)
    tiny_movielens(folder / "films")
    return folder


@pytest.fixture
def options(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(ranking, "FILMS_EACH", 3)
    data = ["--model", str(place / "model"), "--folder", str(place / "films"), "--labels", *LABELS]
    return [*data, "--threads", "1", "--json", str(place / "out.json")]


def test_the_command_writes_what_scripts_read(place: Path, options: list[str]) -> None:
    plot = place / "out.png"
    few = ["--candidates", "1", "4", "--repetitions", "2", "--requests", "6", "--members", "2"]
    ranking.main([*options, *few, "--plot", str(plot)])
    written = json.loads((place / "out.json").read_text())
    *timed, load = written["results"]
    sides = [(runtime, way) for runtime in RUNTIMES for way in ("hot", "cold", "scratch")] + [("transformers", "loop")]
    assert [(row["candidates"], row["runtime"], row["way"]) for row in timed] == [
        (n, *s) for n in (1, 4) for s in sides
    ]
    median = {(row["runtime"], row["way"]): row["median_s"] for row in timed if row["candidates"] == 4}
    for runtime in RUNTIMES:
        expected = median[runtime, "hot"] / median[runtime, "scratch"]
        assert written["ratios"][f"hot_prefix_4_{runtime}"] == pytest.approx(expected)
    assert all(row["prefix_tokens"] > 200 > row["candidate_tokens"] > 10 for row in timed)
    assert (load["way"], load["runtime"], load["requests"], load["load"]) == ("load", "onnx", 6, 0.7)
    assert 0 < load["p50_s"] <= load["p95_s"] <= load["p99_s"] <= load["max_s"]
    assert 0 < load["utilisation"] <= 1 and load["rate_per_s"] > 0 and load["capacity_per_s"] > 0
    assert load["hot_share"] == 1  # a single member has a test split, and its prefix stays
    assert plot.stat().st_size > 10_000


def test_agreement_alone(place: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ranking.main([*options, "--repetitions", "0", "--load", "0", "--agreement", "5"])
    written = json.loads((place / "out.json").read_text())
    (row,) = written["results"]
    assert row["pairs"] == 5 and written["ratios"] == {}
    assert set(row) >= {"onnx_scratch", "torch_hot", "onnx_hot"} and row["compared_with"] == "torch_scratch"
    assert 0 < row["max_difference"] <= 1e-4
    assert re.search(rf"{row['max_difference']:.1e} nats on 5 pairs", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (["--candidates", "0"], "expected numbers of at least 1.*found .*--candidates 0; correct them"),
        (["--load", "1"], "--load from 0 to below 1, found .*--load 1"),
        (["--candidates", "100"], r"expected at most \d+ candidates, the films of the test split, found 100"),
        (["--candidates", "1", "--labels", "no", "yes"], "expected every label as one token"),
    ],
    ids=["no candidates", "full load", "too many films", "split label"],
)
def test_a_mistake_is_one_sentence(mistake: list[str], named: str, options: list[str]) -> None:
    with pytest.raises(ValueError, match=named):
        ranking.main([*options, *mistake])


def test_missing_files_are_named(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"expected .*{tmp_path}"):
        ranking.main([*options, "--folder", str(tmp_path)])
