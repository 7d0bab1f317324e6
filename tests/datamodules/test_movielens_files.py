"""Reading MovieLens: titles as people write them, one number a film, and one clear sentence for whatever is wrong."""

import importlib.machinery
from pathlib import Path

import pytest

from datamodules.movielens_files import Film, movielens_folder, read_ratings
from tests.helpers.tiny_movielens import tiny_movielens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_movielens(tmp_path / "films")


def test_films_and_members(folder: Path) -> None:
    ratings = read_ratings(folder)
    films = {rating.film for rating in ratings}
    assert {
        Film("The Red Kite", 1995, ("Drama",)),
        Film("La Méduse", 1991, ("Comedy", "Romance")),
        Film("Boat V: The Return", 1996, ("Action",)),
        Film("unknown", None, ("unknown",)),
    } < films
    assert len(films) == 11  # twelve numbers
    (second,) = {rating.member for rating in ratings if rating.member.number == "2"}
    assert (second.age, second.gender, second.occupation) == (22, "male", "lawyer")
    assert {rating.member.gender for rating in ratings} == {"male", "female"}
    assert {rating.stars for rating in ratings} == {1, 2, 3, 4, 5}


def test_oldest_first_whatever_the_order_of_lines(folder: Path) -> None:
    ratings = read_ratings(folder)
    assert [r.time for r in ratings] == sorted(r.time for r in ratings)
    path = folder / "ml-100k.inter"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(lines)]))
    assert read_ratings(folder) == ratings


def test_first_of_two_ratings_of_a_film_counts(folder: Path) -> None:
    """Otherwise the answer could be read in the history."""
    path = folder / "ml-100k.inter"
    path.write_text(path.read_text().splitlines()[0] + "\n1\t2\t4\t70\n1\t1\t5\t60\n2\t1\t3\t70\n1\t3\t1\t50\n")
    ratings = read_ratings(folder)
    assert [(r.member.number, r.film.title, r.stars) for r in ratings] == [
        ("1", "La Méduse", 1),
        ("1", "The Red Kite", 5),
        ("2", "The Red Kite", 3),
    ]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("inter", "1\t3\t4", r"expected 4 fields between tabs, found 3 in .*ml-100k.inter line 82; mend"),
        ("inter", "99\t3\t4\t5", r"found user 99 and item 3 in .*ml-100k.inter line 82"),
        ("inter", "1\t99\t4\t5", r"found user 1 and item 99 in .*ml-100k.inter line 82"),
        ("inter", "1\t3\tfour\t5", r"expected a whole number, found 'four' in .*ml-100k.inter line 82"),
        ("inter", "1\t3\tnan\t5", r"expected a whole number, found 'nan' in .*ml-100k.inter line 82"),
        ("user", "9\told\tM\tnone\t0", r"expected a whole number, found 'old' in .*ml-100k.user line 10"),
        ("user", "9\t30\tx\tnone\t0", r"expected M or F as gender, found 'x' in .*ml-100k.user line 10"),
    ],
)
def test_broken_lines(folder: Path, name: str, line: str, message: str) -> None:
    with (folder / f"ml-100k.{name}").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_ratings(folder)


def test_other_columns_and_missing_files(folder: Path) -> None:
    (folder / "ml-100k.item").write_text("item_id:token\tgenre:token_seq\n")
    with pytest.raises(ValueError, match=r"found none of the name movie_title among \['item_id', 'genre'\]"):
        read_ratings(folder)
    (folder / "ml-100k.item").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a file at '.*ml-100k.item', found none"):
        read_ratings(folder)


def test_installed_package_is_used_but_only_with_the_published_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No download: the files of the user's package are taken, and these here are not the published ones."""
    inside = tmp_path / "recbole" / "dataset_example"
    inside.mkdir(parents=True)
    tiny_movielens(inside / "ml-100k")
    found = importlib.machinery.ModuleSpec("recbole", None, is_package=True)
    found.submodule_search_locations = [str(tmp_path / "recbole")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    with pytest.raises(ValueError, match=r"expected ml-100k.user of recbole 1.2.1 with the SHA-256 4f67.* found"):
        movielens_folder()


@pytest.mark.real
def test_the_real_files() -> None:
    ratings = read_ratings(movielens_folder())
    assert (len(ratings), len({r.member for r in ratings}), len({r.film for r in ratings})) == (99693, 943, 1664)
