"""The candidates of the benchmark: members and films of MovieLens' test split, in the prompts that the recipes train on."""

import random
from collections.abc import Sequence
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from datamodules.label_prompts import encode_prompts, frame_of
from datamodules.ranking import Candidate


def usual_prefix(candidates: Sequence[Candidate]) -> str:
    """The prefix of middle length."""
    prefixes = sorted({candidate.prefix for candidate in candidates}, key=lambda prefix: (len(prefix), prefix))
    return prefixes[len(prefixes) // 2]


def shuffled_films(candidates: Sequence[Candidate], at_least: int, seed: int = 0) -> list[str]:
    """All different films in a random order, as prompts; there must be so many."""
    films = sorted({candidate.question for candidate in candidates})
    if at_least > len(films):
        raise ValueError(
            f"expected at most {len(films)} candidates, the films of the test split, found {at_least}; ask for fewer"
        )
    return random.Random(seed).sample(films, len(films))


def sizes_of(tokenizer: PreTrainedTokenizerBase, prefix: str, films: Sequence[str]) -> dict[str, float]:
    """Tokens that the films' prompts share, and the mean number of tokens that each of them adds."""
    prompts = encode_prompts(tokenizer, frame_of(tokenizer), [(prefix, film) for film in films])
    shared = prompts[0].prefix_length
    return {"prefix_tokens": shared, "candidate_tokens": fmean(len(prompt.ids) - shared for prompt in prompts)}


def draw_members(candidates: Sequence[Candidate], number: int, seed: int = 0) -> list[str]:
    """The latest prefixes of so many members, or of all if there are fewer."""
    latest = {candidate.user: candidate.prefix for candidate in candidates}  # candidates are oldest first
    members = sorted(latest.values())
    return random.Random(seed).sample(members, min(number, len(members)))


def draw_pairs(candidates: Sequence[Candidate], number: int, seed: int = 0) -> dict[str, list[str]]:
    """So many pairs, or all if there are fewer: random prefixes with their films, the last one perhaps without some of them."""
    films: dict[str, list[str]] = {}
    for candidate in candidates:
        films.setdefault(candidate.prefix, []).append(candidate.question)
    drawn: dict[str, list[str]] = {}
    for prefix in random.Random(seed).sample(list(films), len(films)):
        if number <= 0:
            break
        drawn[prefix] = films[prefix][:number]
        number -= len(drawn[prefix])
    return drawn
