"""From logits to tokens: truncation by its definitions, random numbers that belong to samples."""

import itertools

import pytest
import torch

from models.generation.sampling import GREEDY, Sampling, sample, seed_of, uniforms
from tests.helpers.rollouts import naive_token

NO_ENDS = torch.tensor([], dtype=torch.long)
LOGITS_V = torch.tensor([0.3, 2.0, -1.0, 1.2, -torch.inf, 0.9, -3.0])


def kept(sampling: Sampling, logits_V: torch.Tensor = LOGITS_V) -> dict[int, float]:
    """What is sampled, with its share, from a fine grid of random numbers."""
    uniform_B = (torch.arange(20_000) + 0.5) / 20_000
    tokens = sample(logits_V.expand(20_000, -1), uniform_B, sampling, end_tokens=NO_ENDS)
    counts = torch.bincount(tokens, minlength=len(logits_V)) / 20_000
    return {token: share for token, share in enumerate(counts.tolist()) if share}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_truncation_by_brute_force(temperature: float, top_k: int, top_p: float) -> None:
    """Top-k, then the smallest set of most probable tokens that reaches top_p: all sets are tried."""
    p = (LOGITS_V.double() / temperature).softmax(0).tolist()
    candidates = sorted(range(len(p)), key=lambda token: -p[token])[: top_k or None]
    total = sum(p[token] for token in candidates)
    enough = [
        chosen
        for size in range(1, len(candidates) + 1)
        for chosen in itertools.combinations(candidates, size)
        if sum(p[token] for token in chosen) >= (top_p - 1e-9) * total
    ]
    smallest = min(map(len, enough))
    best = max((c for c in enough if len(c) == smallest), key=lambda c: sum(p[token] for token in c))
    mass = sum(p[token] for token in best)
    expected = {token: p[token] / mass for token in best if p[token]}
    assert kept(Sampling(temperature, top_k, top_p)) == pytest.approx(expected, abs=2e-4)


def test_random_logits_against_the_naive_token() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_BV = 3 * torch.randn(200, 50, generator=generator)
    uniform_B = torch.rand(200, generator=generator)
    for sampling in (Sampling(), Sampling(0.3), Sampling(2.0, 7), Sampling(1.0, 0, 0.7), Sampling(1.5, 9, 0.8), GREEDY):
        tokens = sample(logits_BV, uniform_B, sampling, end_tokens=NO_ENDS).tolist()
        pairs = zip(logits_BV, uniform_B.tolist(), strict=True)
        assert tokens == [naive_token(logits_V, uniform, sampling) for logits_V, uniform in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_random_number_takes_a_possible_token(dtype: torch.dtype) -> None:
    """Rounding of the sum must not reach tokens of probability 0 at the end; nor must 0 reach those at the beginning."""
    logits_BV = torch.full((2, 1000), -torch.inf, dtype=dtype)
    logits_BV[:, 3:900] = 0.1
    below_one = float(torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)))
    tokens = sample(logits_BV, torch.tensor([0.0, below_one]), Sampling(), end_tokens=NO_ENDS)
    assert tokens.tolist() == [3, 899]


def test_end_tokens_wait_for_the_minimum_length() -> None:
    logits_BV, ends = LOGITS_V[None], torch.tensor([1, 5])
    for temperature, expected in ((0.0, [3, 3, 1]), (1e-3, [3, 3, 1])):
        sampling = Sampling(temperature, min_tokens=2)
        tokens = [
            int(sample(logits_BV, torch.tensor([0.5]), sampling, end_tokens=ends, num_sampled=n)) for n in range(3)
        ]
        assert tokens == expected
    assert LOGITS_V[1] == 2.0, "the caller's logits stay as they are"


def test_random_numbers_belong_to_the_seed() -> None:
    together = uniforms([5, 6, 5, 7], 9)
    assert together.shape == (4, 9)
    assert torch.equal(together[1:2], uniforms([6], 9))
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[:, :4], uniforms([5, 6, 5, 7], 4)), "a prefix: the length of answers decides nothing"
    many = uniforms(range(2000), 4)
    assert many.min() >= 0 and many.max() < 1
    assert many.mean(0) == pytest.approx(torch.full((4,), 0.5).numpy(), abs=0.03)
    assert abs(float(torch.corrcoef(many.T)[0, 1])) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([many[:-1, 0], many[1:, 0]]))[0, 1])) < 0.1, "neighbouring seeds"


def test_seed_of_depends_on_its_key_alone() -> None:
    assert seed_of("rollout", 0, 3, 7) == seed_of("rollout", 0, 3, 7) == 29187033613020099
    keys = [("rollout", 0, 3, 7), ("rollout", 0, 37), ("rollout", 0, 3, 70), ("draw", 0, 3, 7), ("rollout", "0", 3, 7)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_of("x", n) < 2**63 for n in range(100))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("temperature", -1.0, "expected sampling.temperature between 0 and 1,000, found -1"),
        ("temperature", float("nan"), "found nan"),
        ("top_k", -1, "expected sampling.top_k between 0 and 1,000,000,000, found -1"),
        ("top_p", 0.0, "expected sampling.top_p between 1e-06 and 1, found 0"),
        ("top_p", 1.5, "found 1.5"),
        ("min_tokens", -2, "expected sampling.min_tokens between 0 and 1,000,000,000, found -2"),
    ],
)
def test_settings_out_of_range(setting: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}; change it"):
        Sampling(**{setting: value})
