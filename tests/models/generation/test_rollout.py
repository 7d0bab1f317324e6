"""Rollouts against a loop without cache and without padding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.generation.decoder import FusedDecoder, decoder_for
from models.generation.rollout import rollout
from models.generation.sampling import Sampling
from tests.helpers.rollouts import DECODERS, KINDS, STEPS, naive, prompts_of, roll, student_of_kind, texts
from tests.helpers.tiny import tiny_batch, tiny_model


def ends_of(model: PreTrainedModel, batch: Batch) -> list[int]:
    """End tokens that cut the greedy answers to very different lengths."""
    free = roll(model, batch).tokens_BG
    return [int(free[1, 2]), int(free[2, 6])]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_without_cache_and_padding(kind: str, decoder: type, temperature: float, batch: Batch) -> None:
    model = student_of_kind(kind, batch)
    assert (batch["prompt_mask"] == 0).any()
    assert FusedDecoder.supports(model)
    answers = roll(decoder(model, torch.float32), batch, temperature)
    expected = naive(model, prompts_of(batch), Sampling(temperature))
    assert texts(answers) == expected
    assert answers.mask_BG.all()
    said = {token for answer in expected for token in answer}
    assert len(said) > 10, "the model says nearly nothing, so this test shows nearly nothing"


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(2.0, top_k=3),
        Sampling(2.0, top_p=0.6),
        Sampling(2.0, top_k=5, top_p=0.7),
        Sampling(0.0, min_tokens=5),
        Sampling(2.0, min_tokens=5),
    ],
    ids=str,
)
def test_truncation_and_ends(decoder: type, sampling: Sampling, model: PreTrainedModel, batch: Batch) -> None:
    """Also: answers end at different times, and the rows that go on do not notice."""
    free = naive(model, prompts_of(batch), replace(sampling, min_tokens=0))
    ends = [free[0][0], free[1][2], free[2][6]]
    expected = naive(model, prompts_of(batch), sampling, end_tokens=ends)
    assert texts(roll(decoder(model, torch.float32), batch, sampling=sampling, end_tokens=ends)) == expected
    lengths = {len(answer) for answer in expected}
    assert len(lengths) > 1 and min(lengths) < STEPS
    assert min(lengths) > sampling.min_tokens or not sampling.min_tokens


def test_a_minimum_length_bites(model: PreTrainedModel, batch: Batch) -> None:
    ends = ends_of(model, batch)
    shortest = [
        min(map(len, texts(roll(model, batch, sampling=Sampling(0.0, min_tokens=n), end_tokens=ends)))) for n in (0, 6)
    ]
    assert shortest[0] < 6 < shortest[1]


@pytest.mark.parametrize("decoder", DECODERS)
def test_tokens_do_not_depend_on_the_batch(decoder: type, model: PreTrainedModel, batch: Batch) -> None:
    """A row alone, in another order, and among others: its seed and its prompt are all that count."""
    sampler, seeds = decoder(model, torch.float32), [11, 12, 13, 14, 15]
    free = roll(sampler, batch, 1.0, seeds=seeds).tokens_BG
    ends = [int(free[1, 2]), int(free[2, 6]), int(free[3, 8])]
    together = texts(roll(sampler, batch, 1.0, seeds=seeds, end_tokens=ends))
    for row, prompt in enumerate(prompts_of(batch)):
        alone = {"prompt_ids": torch.tensor([prompt]), "prompt_mask": torch.ones(1, len(prompt)).long()}
        assert texts(roll(sampler, alone, 1.0, seeds=seeds[row : row + 1], end_tokens=ends)) == [together[row]]
    order = [3, 0, 4]
    some = {key: batch[key][order] for key in ("prompt_ids", "prompt_mask")}
    drawn = roll(sampler, some, 1.0, seeds=[seeds[row] for row in order], end_tokens=ends)
    assert texts(drawn) == [together[row] for row in order]
    assert len({len(answer) for answer in together}) > 2


@pytest.mark.parametrize("decoder", DECODERS)
def test_more_padding_and_its_content_do_not_matter(decoder: type, model: PreTrainedModel, batch: Batch) -> None:
    filler = torch.randint(0, 300, (len(batch["prompt_ids"]), 9), generator=torch.Generator().manual_seed(0))
    padded = {
        "prompt_ids": torch.cat([filler, torch.where(batch["prompt_mask"].bool(), batch["prompt_ids"], 77)], 1),
        "prompt_mask": torch.cat([torch.zeros_like(filler), batch["prompt_mask"]], 1),
    }
    sampler = decoder(model, torch.float32)
    assert torch.equal(roll(sampler, padded, 1.0).tokens_BG, roll(sampler, batch, 1.0).tokens_BG)


def test_positions_count_from_the_first_real_token(model: PreTrainedModel, batch: Batch) -> None:
    """Rotary embeddings see distances only, but long-context scalings and learned positions see these numbers."""
    seen: list[Tensor] = []
    decoder = DECODERS[0](model, torch.float32)
    decoder.model.base_model.register_forward_pre_hook(
        lambda _, args, kw: seen.append(kw["position_ids"]), with_kwargs=True
    )
    roll(decoder, batch, max_new_tokens=3)
    lengths = batch["prompt_mask"].sum(1)
    for row, length in enumerate(lengths.tolist()):
        assert seen[0][row, -length:].tolist() == list(range(length))
    assert torch.equal(seen[1][:, 0], lengths)
    assert torch.equal(seen[2][:, 0], lengths + 1)


@pytest.mark.parametrize("decoder", DECODERS)
def test_everything_after_the_first_end_token_is_masked(decoder: type, model: PreTrainedModel, batch: Batch) -> None:
    free = roll(model, batch).tokens_BG
    ends = ends_of(model, batch)
    answers = roll(decoder(model, torch.float32), batch, end_tokens=ends)
    lengths = []
    for row, tokens in enumerate(free.tolist()):
        first = next((i for i, token in enumerate(tokens) if token in ends), STEPS - 1)
        lengths.append(first + 1)
        width = answers.mask_BG.shape[1]
        assert answers.mask_BG[row].tolist() == [1] * (first + 1) + [0] * (width - first - 1)
        assert answers.tokens_BG[row, : first + 1].tolist() == tokens[: first + 1]
        assert not answers.tokens_BG[row, first + 1 :].any()
    assert len(set(lengths)) > 2, "answers of different lengths are what this test is about"


@pytest.mark.parametrize("decoder", DECODERS)
def test_ended_rows_leave_the_decoder(decoder: type, model: PreTrainedModel, batch: Batch) -> None:
    """As soon as they are a quarter of its rows; what it computes afterwards are fewer rows."""
    sampler, kept, computed = decoder(model, torch.float32), [], []
    keep, step = sampler.keep, sampler.step

    def spying_keep(rows: Tensor) -> None:
        kept.append(rows.tolist())
        keep(rows)

    def spying_step(token_B: Tensor) -> Tensor:
        computed.append(len(token_B))
        return step(token_B)

    sampler.keep, sampler.step = spying_keep, spying_step
    ends = ends_of(model, batch)
    lengths = [len(answer) for answer in texts(roll(sampler, batch, end_tokens=ends))]
    rows, expected = list(range(len(lengths))), []
    for position in range(1, max(lengths)):
        alive = [row for row in rows if lengths[row] > position]
        if len(alive) <= 0.75 * len(rows):
            expected.append([rows.index(row) for row in alive])
            rows = alive
        assert computed[position - 1] == len(rows)
    assert kept == expected
    assert len(kept) > 1 and len(computed) == max(lengths) - 1


def test_stops_when_all_have_ended(model: PreTrainedModel, batch: Batch) -> None:
    free = roll(model, batch).tokens_BG
    answers = roll(model, batch, end_tokens=free[:, 1].tolist())
    assert answers.tokens_BG.shape == (len(free), 2)
    assert answers.mask_BG[:, 0].all()


def test_seeds_decide(model: PreTrainedModel, batch: Batch) -> None:
    torch.manual_seed(0)
    first = roll(model, batch, 1.0, seeds=[5, 6, 7, 8, 9]).tokens_BG
    torch.manual_seed(1)  # the global generator takes no part
    state = torch.get_rng_state()
    assert torch.equal(roll(model, batch, 1.0, seeds=[5, 6, 7, 8, 9]).tokens_BG, first)
    assert torch.equal(torch.get_rng_state(), state)
    other = roll(model, batch, 1.0, seeds=[5, 6, 7, 8, 99]).tokens_BG
    assert torch.equal(other[:4], first[:4]) and not torch.equal(other[4], first[4])


@pytest.mark.parametrize(("seeds", "found"), [(None, "none"), ([1, 2], "2")])
def test_sampling_needs_seeds(model: PreTrainedModel, batch: Batch, seeds: list[int] | None, found: str) -> None:
    with pytest.raises(
        ValueError, match=f"expected a seed for each of 5 samples at temperature 1, found {found}; pass"
    ):
        rollout(
            decoder_for(model, torch.float32),
            batch["prompt_ids"],
            batch["prompt_mask"],
            max_new_tokens=2,
            end_tokens=[],
            sampling=Sampling(),
            seeds=seeds,
        )


def test_samples_follow_the_distribution(model: PreTrainedModel) -> None:
    prompt = torch.tensor([[5, 6, 7]]).expand(4000, 3)
    many = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt)}
    tokens = roll(model, many, 2.0, max_new_tokens=1).tokens_BG[:, 0]
    with torch.no_grad():
        expected = (model(prompt[:1]).logits[0, -1] / 2.0).softmax(0)
    frequencies = torch.bincount(tokens, minlength=300) / 4000
    assert (frequencies - expected).abs().max() < 4 * (expected.max() / 4000).sqrt()


def test_tokens_outside_the_vocabulary_are_never_sampled(model: PreTrainedModel, batch: Batch) -> None:
    """Rows of the head beyond the tokenizer's tokens are padding."""
    assert roll(model, batch, 2.0).tokens_BG.max() >= 50
    for temperature in (0.0, 2.0):
        assert roll(model, batch, temperature, vocabulary=50, end_tokens=[280]).tokens_BG.max() < 50


def test_prompts_of_one_length_need_no_padding() -> None:
    model, batch = tiny_model(), tiny_batch([("ab", "c"), ("cd", "e")])
    assert batch["prompt_mask"].all()
    assert texts(roll(model, batch)) == naive(model, prompts_of(batch), Sampling(0.0))
