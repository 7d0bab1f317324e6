"""A made-up MovieLens in recbole's format: eight members, eleven films under twelve numbers, many ratings in the same second."""

import random
from pathlib import Path

FILMS = [
    "1\tRed Kite, The\t1995\tDrama",
    "2\tRed Kite, The\t1995\tDrama",  # the same film twice
    "3\tMéduse, La\t1991\tComedy Romance",
    "4\tBoat V: The Return (1996)\tV\tAction",
    "5\tunknown\tunknown\tunknown",
    *[f"{number}\tFilm {number}\t19{60 + number}\tDrama Thriller" for number in range(6, 13)],
]
#: Settings of the data module that fit it, and the byte-level tokenizer, which has letters as whole tokens.
SETTINGS: dict[str, object] = {
    "folder": "films",
    "labels": ["n", "y"],
    "history": 2,
    "max_length": 600,
    "val_fraction": 0.2,
    "test_fraction": 0.2,
    "train_size": 40,  # with a batch of 4, an epoch of ten batches
    "val_size": None,
    "batch_size": 4,
    "eval_batch_size": 8,
}
JOBS = ["artist", "doctor", "lawyer", "none"]


def tiny_movielens(folder: Path, seed: int = 0) -> Path:
    """Every member rates most films, several in each second; members begin at different times, and lines come in no order."""
    draw = random.Random(seed)
    members = [f"{number}\t{20 + number}\t{'MF'[number % 2]}\t{JOBS[number % 4]}\t000" for number in range(1, 9)]
    ratings = []
    for member in range(1, 9):
        time = 1000 + 8 * member
        for film in draw.sample(range(1, 13), 10):
            ratings.append(f"{member}\t{film}\t{draw.randint(1, 5)}\t{time}")
            time += draw.choice([0, 0, 1, 5])
    draw.shuffle(ratings)
    folder.mkdir(exist_ok=True)
    for name, header, rows in (
        ("user", "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token", members),
        ("item", "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq", FILMS),
        ("inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", ratings),
    ):
        (folder / f"ml-100k.{name}").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder
