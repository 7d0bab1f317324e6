"""Rollouts against a loop without cache and without padding, and the batches made of them."""

import pytest
import torch
from chat_doubles import byte_tokenizer
from tiny import tiny_batch, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from models.forward import IGNORE, Batch, answer_labels
from models.rollout import Rollout, answer_texts, rollout, rollout_batch
from models.structure import replay

STEPS = 12


def prompts_of(batch: Batch) -> list[list[int]]:
    rows = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def roll(model: PreTrainedModel, batch: Batch, temperature: float = 0.0, seed: int = 0, **settings) -> Rollout:
    generator = torch.Generator().manual_seed(seed) if temperature else None
    settings = {"max_new_tokens": STEPS, "end_tokens": [], "generator": generator, **settings}
    return rollout(model, batch["prompt_ids"], batch["prompt_mask"], temperature=temperature, **settings)


@torch.no_grad()
def naive(model: PreTrainedModel, prompts: list[list[int]], temperature: float = 0.0, seed: int = 0) -> Tensor:
    """Every prompt alone, in full at every step."""
    generator = torch.Generator().manual_seed(seed)
    rows = [list(prompt) for prompt in prompts]
    for _ in range(STEPS):
        logits = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
        if temperature:
            probabilities = (logits.double() / temperature).exp()
            tokens = torch.multinomial((probabilities / probabilities.sum(1, True)).float(), 1, generator=generator)
        else:
            tokens = logits.argmax(1, keepdim=True)
        for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            row.append(token)
    return torch.tensor([row[-STEPS:] for row in rows])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equals_a_loop_without_cache_and_padding(family: str, temperature: float, batch: Batch) -> None:
    model = tiny_model(family)
    assert (batch["prompt_mask"] == 0).any()
    answers = roll(model, batch, temperature, seed=3)
    expected = naive(model, prompts_of(batch), temperature, seed=3)
    assert torch.equal(answers.tokens_BG, expected)
    assert answers.mask_BG.all()
    assert len(expected.unique()) > 10, "the model says nearly nothing, so this test shows nearly nothing"


def test_after_pruning(batch: Batch) -> None:
    model = tiny_model(num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    replay(
        model, [{"op": "narrow_kv_groups", "layer": 0, "keep": [1, 3]}, {"op": "narrow_mlp", "layer": 1, "keep": [7]}]
    )
    assert torch.equal(roll(model, batch).tokens_BG, naive(model, prompts_of(batch)))


def test_a_batch_equals_its_rows_alone(model: PreTrainedModel, batch: Batch) -> None:
    together = roll(model, batch).tokens_BG
    for row, prompt in enumerate(prompts_of(batch)):
        alone = roll(model, {"prompt_ids": torch.tensor([prompt]), "prompt_mask": torch.ones(1, len(prompt)).long()})
        assert torch.equal(alone.tokens_BG[0], together[row])


def test_more_padding_and_its_content_do_not_matter(model: PreTrainedModel, batch: Batch) -> None:
    filler = torch.randint(0, 300, (len(batch["prompt_ids"]), 9), generator=torch.Generator().manual_seed(0))
    padded = {
        "prompt_ids": torch.cat([filler, torch.where(batch["prompt_mask"].bool(), batch["prompt_ids"], 77)], 1),
        "prompt_mask": torch.cat([torch.zeros_like(filler), batch["prompt_mask"]], 1),
    }
    assert torch.equal(roll(model, padded).tokens_BG, roll(model, batch).tokens_BG)


def test_positions_count_from_the_first_real_token(model: PreTrainedModel, batch: Batch) -> None:
    """Rotary embeddings see distances only, but long-context scalings and learned positions see these numbers."""
    seen: list[Tensor] = []
    model.base_model.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["position_ids"]), with_kwargs=True)
    roll(model, batch, max_new_tokens=3)
    lengths = batch["prompt_mask"].sum(1)
    for row, length in enumerate(lengths.tolist()):
        assert seen[0][row, -length:].tolist() == list(range(length))
    assert torch.equal(seen[1][:, 0], lengths)
    assert torch.equal(seen[2][:, 0], lengths + 1)


def test_everything_after_the_first_end_token_is_masked(model: PreTrainedModel, batch: Batch) -> None:
    free = roll(model, batch).tokens_BG
    ends = [int(free[1, 2]), int(free[2, 6])]
    answers = roll(model, batch, end_tokens=ends)
    lengths = []
    for row, tokens in enumerate(free.tolist()):
        first = next((i for i, token in enumerate(tokens) if token in ends), STEPS - 1)
        lengths.append(first + 1)
        width = answers.mask_BG.shape[1]
        assert answers.mask_BG[row].tolist() == [1] * (first + 1) + [0] * (width - first - 1)
        assert answers.tokens_BG[row, : first + 1].tolist() == tokens[: first + 1]
    assert len(set(lengths)) > 2, "answers of different lengths are what this test is about"


def test_stops_when_all_have_ended(model: PreTrainedModel, batch: Batch) -> None:
    free = roll(model, batch).tokens_BG
    answers = roll(model, batch, end_tokens=free[:, 1].tolist())
    assert answers.tokens_BG.shape == (len(free), 2)
    assert answers.mask_BG[:, 0].all()


def test_a_seed_decides(model: PreTrainedModel, batch: Batch) -> None:
    torch.manual_seed(0)
    first = roll(model, batch, 1.0, seed=5).tokens_BG
    torch.manual_seed(1)  # the global generator takes no part
    state = torch.get_rng_state()
    assert torch.equal(roll(model, batch, 1.0, seed=5).tokens_BG, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(roll(model, batch, 1.0, seed=6).tokens_BG, first)


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
        assert roll(model, batch, temperature, vocabulary=50).tokens_BG.max() < 50


def test_nothing_is_recorded_for_gradients(model: PreTrainedModel, batch: Batch) -> None:
    model.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not roll(model, batch, 1.0).tokens_BG.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Batches ------------------------------------------------------------------------------------------------------------


def test_rollout_batch_by_hand() -> None:
    batch = {
        "prompt_ids": torch.tensor([[9, 9, 11], [21, 22, 23]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
        "input_ids": torch.zeros(2, 9).long(),
        "prompts": ["a", "b"],
        "index": [4, 2],
    }
    answers = Rollout(torch.tensor([[31, 1, 77], [41, 42, 43]]), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    ours = rollout_batch(batch, answers)
    assert ours["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert ours["input_ids"][0, :3].tolist() == [11, 31, 1]
    assert ours["input_ids"][1].tolist() == [21, 22, 23, 41, 42, 43]
    assert ours["labels"].tolist() == [[IGNORE, 31, 1, *[IGNORE] * 3], [*[IGNORE] * 3, 41, 42, 43]]
    assert (ours["prompts"], ours["index"]) == (["a", "b"], [4, 2])
    assert batch["input_ids"].shape == (2, 9), "the batch given stays as it was"


def test_rollout_batch_is_no_wider_than_its_longest_row(model: PreTrainedModel, batch: Batch) -> None:
    free = roll(model, batch).tokens_BG
    answers = roll(model, batch, end_tokens=[int(free[1, 2]), int(free[2, 6])])
    ours = rollout_batch(batch, answers)
    lengths = batch["prompt_mask"].sum(1) + answers.mask_BG.sum(1)
    assert ours["input_ids"].shape[1] == lengths.max() < batch["prompt_ids"].shape[1] + answers.mask_BG.shape[1]
    assert torch.equal(ours["attention_mask"].sum(1), lengths)
    assert (ours["attention_mask"].diff(dim=1) <= 0).all()  # padding stands on the right
    assert torch.equal(answer_labels(ours), answers.tokens_BG[answers.mask_BG.bool()])  # the end token included
    for row, prompt in enumerate(prompts_of(batch)):
        assert ours["input_ids"][row, : len(prompt)].tolist() == prompt
        assert (ours["labels"][row, : len(prompt)] == IGNORE).all()


def test_rollout_batch_of_gold_answers_is_the_batch(batch: Batch) -> None:
    """The loader's own collation and ours agree when the 'generated' tokens are the gold ones."""
    labels = [row[row != IGNORE] for row in batch["labels"]]
    width = max(len(row) for row in labels)
    tokens = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=1) for row in labels])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in labels])
    ours = rollout_batch(batch, Rollout(tokens, mask))
    for key in ("input_ids", "attention_mask", "labels"):
        visible = batch["attention_mask"].bool()
        assert torch.equal(ours[key][visible], batch[key][visible])


def test_texts_hold_no_special_tokens_and_no_padding() -> None:
    tokenizer = byte_tokenizer()
    hello = tokenizer("hello", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[*hello, 1, 50], [*hello, *hello[:2]]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1] * 7])
    assert answer_texts(tokenizer, Rollout(tokens, mask)) == ["hello", "hellohe"]


def test_prompts_of_one_length_need_no_padding(model: PreTrainedModel) -> None:
    batch = tiny_batch([("ab", "c"), ("cd", "e")])
    assert batch["prompt_mask"].all()
    assert torch.equal(roll(model, batch).tokens_BG, naive(model, prompts_of(batch)))
