"""MovieLens as candidates: texts, limits that cost the oldest ratings, members that come whole, and settings."""

from pathlib import Path
from typing import Any

import pytest

from datamodules import MovieLens
from datamodules.movielens_files import Film, Member, Rating
from datamodules.movielens_ranking import prefix_of, prompt_of
from datamodules.ranking import RankingExample
from tests.helpers.tiny_movielens import tiny_movielens

MEMBER = Member("7", 31, "female", "lawyer")
KITE = Film("The Red Kite", 1995, ("Drama", "War"))
BOAT = Film("Boat", None, ("unknown",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_movielens(tmp_path_factory.mktemp("films")))


def films(tokenizer_folder: str, folder: str, **settings: Any) -> MovieLens:
    defaults = {"labels": ["n", "y"], "max_length": 2000, "val_fraction": 0.2, "test_fraction": 0.2, "history": 4}
    return MovieLens(tokenizer_folder, folder=folder, **{**defaults, **settings})


def test_texts() -> None:
    history = [Rating(MEMBER, BOAT, 2, 1), Rating(MEMBER, KITE, 5, 2)]
    assert prefix_of(MEMBER, history, ("no", "yes")) == (
        "Will this person like the film below? Answer yes or no.\n"
        "Profile: 31 years, female, lawyer\n"
        "Latest ratings, 1 to 5 stars:\n"
        "2 Boat (unknown)\n"
        "5 The Red Kite (1995, Drama, War)"
    )
    assert prefix_of(MEMBER, [], ("no", "yes")).endswith("lawyer\nLatest ratings: none")
    assert prompt_of(KITE) == "Film: The Red Kite (1995, Drama, War)"


def test_candidates_are_the_pairs(tokenizer_folder: str, folder: str) -> None:
    data = films(tokenizer_folder, folder)
    batches = list(data.test_dataloader())
    seen = [(index, row) for batch in batches for row, index in enumerate(batch["index"])]
    assert sorted(index for index, _ in seen) == list(range(len(data.pairs["test"])))
    for batch in batches:
        for row, index in enumerate(batch["index"]):
            pair = data.pairs["test"][index]
            assert batch["class_B"][row] == int(pair.rating.stars >= 4)
            assert batch["user"][row] == pair.rating.member.number
            text = batch["prompts"][row]
            assert text.endswith(f"Film: {pair.rating.film.title} ({_inside(pair.rating.film)})")
            assert [line[0] for line in text.splitlines()[3:-1]] == [str(r.stars) for r in pair.history]


def test_long_prompts_lose_their_oldest_ratings(tokenizer_folder: str, folder: str) -> None:
    whole = films(tokenizer_folder, folder)
    lengths = [example.prompt_length for example in whole.examples("test")]
    limit = sorted(lengths)[len(lengths) // 2]
    data = films(tokenizer_folder, folder, max_length=limit)
    examples = data.examples("test")
    assert data.truncation["test"] == {"cut": 0, "dropped": 0, "total": len(lengths)}
    prefixes: dict[tuple[str, int], str] = {}
    num_shorter = 0
    for before, example, pair in zip(whole.conversations("test"), examples, data.pairs["test"], strict=True):
        assert len(example) <= limit
        candidate = data.conversations("test")[example.index]
        assert candidate.question == before.question
        assert prefixes.setdefault((pair.rating.member.number, pair.rating.time), candidate.prefix) == candidate.prefix
        old, new = before.prefix.splitlines()[3:], candidate.prefix.splitlines()[3:]
        assert new == old[len(old) - len(new) :]
        num_shorter += len(new) < len(old)
    assert 0 < num_shorter < len(examples)


def test_no_room_for_the_profile(tokenizer_folder: str, folder: str) -> None:
    with pytest.raises(ValueError, match=r"expected train samples that fit into max_length 50.*found none"):
        films(tokenizer_folder, folder, max_length=50).setup("fit")


def test_sizes(tokenizer_folder: str, folder: str) -> None:
    data = films(tokenizer_folder, folder, train_size=20, val_size=3, test_size=3)
    everything = films(tokenizer_folder, folder)
    assert len(data.examples("train")) == 20
    for split in ("val", "test"):
        members = {pair.rating.member for pair in data.pairs[split]}
        assert data.pairs[split] == [pair for pair in everything.pairs[split] if pair.rating.member in members]
        assert 3 <= len(data.pairs[split]) < len(everything.pairs[split])
    assert films(tokenizer_folder, folder, train_size=20).pairs["train"] == data.pairs["train"]
    assert films(tokenizer_folder, folder, train_size=20, seed=1).pairs["train"] != data.pairs["train"]


def test_figures_are_logged_once(tokenizer_folder: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("datamodules.movielens_ranking.rank_zero_info", said.append)
    data = films(tokenizer_folder, folder)
    data.setup("fit")
    data.setup("test")
    assert [message.split(":")[0] for message in said] == ["MovieLens train", "MovieLens val", "MovieLens test"]
    test = data.figures["test"]
    assert f"test: {test['pairs']} pairs" in said[2]
    assert f"{test['new_members']} and {test['new_films']} are not in training" in said[2]


def test_without_validation(tokenizer_folder: str, folder: str) -> None:
    data = films(tokenizer_folder, folder, val_fraction=0.0)
    data.setup("fit")
    assert data.val_dataloader() == []


def test_only_one_answer_in_training(tokenizer_folder: str, tmp_path: Path) -> None:
    path = tiny_movielens(tmp_path / "films") / "ml-100k.inter"
    header, *lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([header, *["\t".join([*line.split("\t")[:2], "5", line.split("\t")[3]]) for line in lines]])
    )
    with pytest.raises(ValueError, match=r"expected every label among the \d+ training samples, found none with 'n'"):
        films(tokenizer_folder, str(path.parent)).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"history": -1}, "expected data.history between 0 and 1,000,000,000, found -1"),
        ({"test_size": 0}, "expected data.test_size between 1 and 1,000,000,000, found 0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "together below 1, found 0.5 and 0.5"),
        ({"val_fraction": -0.1}, "expected data.val_fraction between 0 and 1, found -0.1"),
        ({"labels": ["no", "maybe", "yes"]}, r"expected two labels.* found \['no', 'maybe', 'yes'\]"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MovieLens("any", **settings)


@pytest.mark.real
def test_real_prompts() -> None:
    data = MovieLens("package:smollm2-135m-instruct", train_size=200, val_size=50)
    data.setup("fit")
    assert data.truncation["train"]["dropped"] == 0
    examples = [example for example in data.examples("train") if isinstance(example, RankingExample)]
    assert len(examples) == 200
    assert all(example.prefix_length > 0.7 * example.prompt_length for example in examples if "stars" in example.prompt)
    assert data.tokenizer.convert_ids_to_tokens(data.label_token_ids.tolist()) == ["no", "yes"]


def _inside(film: Film) -> str:
    return ", ".join([*([str(film.year)] if film.year else []), *film.genres])
