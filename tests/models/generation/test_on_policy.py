"""Which optimizer steps learn from the student's own answers: probabilities, draws, and what is sampled or replayed."""

from typing import Any

import pytest
import torch

from models.generation.decoder import Decoder, decoder_for
from models.generation.on_policy import OnPolicy, OnPolicyAnswers
from models.generation.sampling import Sampling
from tests.helpers.rollouts import texts
from tests.helpers.tiny import tiny_batch, tiny_model

PROMPTS = tiny_batch()


def answers_with(**settings: Any) -> OnPolicyAnswers:
    return OnPolicyAnswers(OnPolicy(**settings), Sampling(2.0))


def part(*rows: int) -> dict[str, Any]:
    """A micro-batch of some of the samples, no wider than its longest prompt."""
    width = int(PROMPTS["prompt_mask"][list(rows)].sum(1).max())
    tensors = {key: PROMPTS[key][list(rows), -width:] for key in ("prompt_ids", "prompt_mask")}
    return {**tensors, "index": list(rows)}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_for(tiny_model(), torch.float32)


def ask(own: OnPolicyAnswers, decoder: Decoder, batches: list[dict[str, Any]], step: int = 0, **kw: Any) -> list:
    settings = {"source": "fresh", "rank": 0, "end_tokens": [1], "vocabulary": 260, **kw}
    source, rank = settings.pop("source"), settings.pop("rank")
    return own.answers(source, batches, step, rank, lambda: decoder, **settings)


# When ---------------------------------------------------------------------------------------------------------------


def test_probability_is_a_function_of_the_step() -> None:
    own = answers_with(start=10, ramp=4, share=0.8)
    values = [own.probability(step) for step in (0, 9, 10, 11, 12, 13, 14, 1000)]
    assert values == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    own = answers_with(start=3)  # no ramp: all at once
    assert [own.probability(step) for step in (2, 3, 4)] == [0, 1, 1]
    assert [answers_with().probability(step) for step in (0, 10**6)] == [0, 0]  # no stage 2


def test_the_adaptive_share_rises_with_the_validation_loss() -> None:
    own = answers_with(start=5, adaptive=0.25, tolerance=0.1, share=0.6, ramp=3)
    shares = []
    for nll in (2.0, 1.5, 1.59, 1.68, 1.79, 1.2, 1.3001, 1.5, 9.0):
        own.validated(nll)
        shares.append(own.probability(5))
    #                 first, better, +0.09, +0.09, +0.11, better, +0.1, +0.2 (capped at share), +7.5
    assert shares == [0, 0, 0, 0, 0.25, 0.25, 0.5, 0.6, 0.6]
    assert own.probability(4) == 0  # stage 2 has not begun
    fixed = answers_with(start=0, share=0.3)
    for nll in (1.0, 5.0):
        fixed.validated(nll)
    assert (fixed.probability(0), fixed.adaptive_share) == (0.3, 0.0)


def test_the_draw_depends_on_step_and_seed_only() -> None:
    def draws(seed: int) -> list[str]:
        own = answers_with(start=0, share=0.5, seed=seed)
        torch.rand(seed + 3)  # the global generator takes no part
        return [own.source(step, 400) for step in range(400)]

    first = draws(0)
    assert draws(0) == first
    assert draws(1) != first
    assert 160 < first.count("fresh") < 240 and first.count("dataset") == 400 - first.count("fresh")
    always, never = answers_with(start=0), answers_with(start=0, share=0.0)
    assert {always.source(step, 100) for step in range(100)} == {"fresh"}
    assert {never.source(step, 100) for step in range(100)} == {"dataset"}


def test_replay_begins_when_the_buffer_is_full_and_grows(decoder: Decoder) -> None:
    own = answers_with(start=0, replay_size=8, tokens=3)
    ask(own, decoder, [part(0, 1, 2, 3, 4)])
    assert {own.source(step, 1000) for step in range(1000)} == {"fresh"}
    ask(own, decoder, [part(0, 1, 2)])
    sources = [own.source(step, 1000) for step in range(1000)]
    shares = [sources[start : start + 250].count("replay") / 250 for start in range(0, 1000, 250)]
    assert shares == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.08)
    assert {own.source(step, -1) for step in range(1000)} == {"fresh"}  # a run without an end has no course
    half = answers_with(start=0, replay_size=8, share=0.5)
    half.replay = own.replay
    sources = [half.source(step, 1000) for step in range(1000)]
    assert [sources.count(source) / 1000 for source in ("dataset", "replay")] == pytest.approx([0.5, 0.25], abs=0.05)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("share", 1.5, "expected on_policy.share between 0 and 1, found 1.5"),
        ("share", -0.1, "found -0.1"),
        ("adaptive", 2, "expected on_policy.adaptive between 0 and 1, found 2"),
        ("ramp", -1, "expected on_policy.ramp between 0 and 1,000,000,000, found -1"),
        ("tokens", 0, "expected on_policy.tokens between 1 and 1,000,000, found 0"),
        ("batch_size", -1, "expected on_policy.batch_size between 0 and 1,000,000,000, found -1"),
        ("replay_size", -5, "expected on_policy.replay_size between 0 and 1,000,000,000, found -5"),
        ("share", float("nan"), "found nan"),
    ],
)
def test_settings_out_of_range(setting: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}; change it"):
        OnPolicy(**{setting: value})


# What ---------------------------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_the_cut(decoder: Decoder) -> None:
    """Micro-batches, their order, ranks and `batch_size`: a sample's answer is its own."""
    everybody = [part(0, 1, 2, 3, 4)]
    free = texts(ask(answers_with(tokens=9), decoder, everybody, step=3, end_tokens=[])[0][1])
    ends = [free[0][0], free[1][2], free[2][5]]
    whole = texts(ask(answers_with(tokens=9), decoder, everybody, step=3, end_tokens=ends)[0][1])
    assert len({len(answer) for answer in whole}) > 2
    for cut in ([(0, 1), (2,), (3, 4)], [(4, 0), (3, 1, 2)]):
        for batch_size in (0, 1, 2, 3):
            own = answers_with(tokens=9, batch_size=batch_size)
            parts = ask(own, decoder, [part(*rows) for rows in cut], step=3, rank=1, end_tokens=ends)
            for rows, (batch, answers) in zip(cut, parts, strict=True):
                assert batch["index"] == list(rows)
                assert texts(answers) == [whole[row] for row in rows]
    assert texts(ask(answers_with(tokens=9), decoder, everybody, step=4, end_tokens=[])[0][1]) != free
    assert texts(ask(answers_with(tokens=9, seed=1), decoder, everybody, step=3, end_tokens=[])[0][1]) != free


def test_batch_size_limits_what_is_sampled_at_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    prefill = decoder.prefill

    def spying(prompts_BP: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(len(prompts_BP))
        return prefill(prompts_BP, *args)

    monkeypatch.setattr(decoder, "prefill", spying)
    for batch_size in (0, 2):
        ask(answers_with(tokens=3, batch_size=batch_size), decoder, [part(0, 1), part(2, 3, 4)])
    assert rows == [5, 2, 2, 1]


def test_replay_samples_nothing(decoder: Decoder) -> None:
    own = answers_with(start=0, replay_size=5, tokens=4)
    fresh = ask(own, decoder, [part(0, 1), part(2, 3, 4)])
    said = {i: text for batch, answers in fresh for i, text in zip(batch["index"], texts(answers), strict=True)}

    def no_decoder() -> Decoder:
        raise AssertionError("nothing should be sampled")

    def drawn(step: int, rank: int) -> list[int]:
        settings = {"end_tokens": [1], "vocabulary": 260}
        parts = own.answers("replay", [part(0, 1), part(2, 3, 4)], step, rank, no_decoder, **settings)
        assert [len(batch["index"]) for batch, _ in parts] == [2, 3]
        for batch, answers in parts:
            assert texts(answers) == [said[index] for index in batch["index"]]
        return [index for batch, _ in parts for index in batch["index"]]

    assert drawn(7, 0) == drawn(7, 0)
    assert len({tuple(drawn(step, rank)) for step in range(3) for rank in range(2)}) > 3
