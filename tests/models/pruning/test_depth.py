"""Block influence by its definition, a block found where it was planted, and layers that are skipped as if they were not there."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import FAMILIES, decoder_layers
from models.forward import answer_labels, answer_logits
from models.pruning.depth import block_influence, layers_to_drop, removal_loss, search_block, without_layers
from models.structure.layers import drop_layers
from tests.helpers.masking import close, cut_model, logits
from tests.helpers.tiny import tiny_batch

LONGER = [("one two three four", "five six"), ("?", "!")]


@torch.no_grad()
def make_identity(model: PreTrainedModel, layers: list[int]) -> None:
    for layer in layers:
        decoder_layers(model)[layer].o_proj.weight.zero_()
        decoder_layers(model)[layer].down_proj.weight.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_block_influence_by_its_definition(family: str, batch: Batch) -> None:
    model, cosines = cut_model(family), []
    for one in (batch, tiny_batch(LONGER)):
        for ids, mask in zip(one["input_ids"], one["attention_mask"], strict=True):
            last: list[Tensor] = []  # what transformers lists as the last state is after the norm
            hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
            with torch.no_grad():
                states = model(ids[mask.bool()][None], output_hidden_states=True).hidden_states
            hook.remove()
            states = torch.cat([*states[:-1], last[0]]).double()
            unit = states / states.norm(dim=-1, keepdim=True)
            cosines.append((unit[:-1] * unit[1:]).sum(-1))
    found = block_influence(model, [batch, tiny_batch(LONGER)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (1 - torch.cat(cosines, 1).mean(1)).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_changes_nothing_has_no_influence(family: str, batch: Batch) -> None:
    model = cut_model(family)
    make_identity(model, [1])
    influence = block_influence(model, [batch])
    assert influence[1].abs() < 1e-6
    assert influence[[0, 2]].min() > 1e-3
    assert layers_to_drop(influence, 1) == [1]


def test_processes_together_judge_all_their_batches(model: PreTrainedModel, batch: Batch) -> None:
    """The batches differ in their tokens, so a mean of the processes' means would not do."""
    sent: list[Tensor] = []

    def send(sums: Tensor) -> Tensor:
        sent.append(sums.clone())
        return sums

    block_influence(model, [tiny_batch(LONGER)], total=send)
    halves = block_influence(model, [batch], total=lambda sums: sums + sent[0])
    torch.testing.assert_close(halves, block_influence(model, [batch, tiny_batch(LONGER)]))


def test_padding_does_not_matter_and_nothing_is_left_behind(model: PreTrainedModel, batch: Batch) -> None:
    model.train()
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 17)}
    assert torch.equal(block_influence(model, [batch]), block_influence(model, [other]))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="expected at least one calibration batch, found none"):
        block_influence(model, [])


def test_the_lowest_layers_go_and_of_equal_ones_the_first() -> None:
    scores = torch.tensor([0.9, 0.1, 0.3, 0.1, 0.2])
    assert [layers_to_drop(scores, count) for count in (1, 2, 3)] == [[1], [1, 3], [1, 3, 4]]


@pytest.mark.parametrize("layers", [[1], [0, 2], [2, 3]])
@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_layers_are_as_if_dropped(family: str, layers: list[int]) -> None:
    """Also where layers of two kinds of attention take turns: each remaining one keeps its kind."""
    model = cut_model(family, num_hidden_layers=4)
    whole = logits(model)
    with without_layers(model, layers):
        skipped = logits(model)
    assert torch.equal(logits(model), whole)
    drop_layers(model, layers=layers)
    assert not torch.allclose(skipped, whole, atol=1e-2)
    close(skipped, logits(model))


def test_everything_is_back_even_after_an_error_and_when_nested(model: PreTrainedModel) -> None:
    first, second = model.model.layers
    first.forward = wrapped = partial(type(first).forward, first)  # as a wrapper leaves it
    before = [dict(vars(first)), dict(vars(second))]
    with without_layers(model, [0]):
        with pytest.raises(IndexError), without_layers(model, [0, 1]):
            model(torch.tensor([[10**6]]))
        assert first.forward is not wrapped
        assert "forward" not in vars(second)
    assert first.forward is wrapped
    assert [vars(first), vars(second)] == before


@pytest.mark.parametrize("layers", [[2], [-1], [1, 0], []])
def test_layers_to_skip_must_exist(model: PreTrainedModel, layers: list[int]) -> None:
    with (
        pytest.raises(ValueError, match="expected without_layers to skip decoder layers"),
        without_layers(model, layers),
    ):
        pass


def test_search_finds_a_planted_block_by_kl(batch: Batch) -> None:
    model = cut_model("llama", num_hidden_layers=6)
    make_identity(model, [2, 3])
    asked = []

    @torch.no_grad()
    def metric(layers: list[int]) -> float:
        asked.append(layers)
        dense = answer_logits(model, batch).log_softmax(-1)
        with without_layers(model, layers):
            cut = answer_logits(model, batch).log_softmax(-1)
        return float(F.kl_div(cut, dense, reduction="batchmean", log_target=True))

    assert search_block(6, 2, metric) == [2, 3]
    assert asked == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]


def test_search_takes_the_first_of_equal_blocks_and_an_infinite_metric_loses() -> None:
    values = {0: math.inf, 1: 2.0, 2: 1.0, 3: 1.0}
    assert search_block(6, 3, lambda layers: values[layers[0]]) == [2, 3, 4]
    with pytest.raises(ValueError, match="expected the metric without layers 1 to 2 to be a number, found nan"):
        search_block(4, 2, lambda layers: math.nan if layers[0] == 1 else 0.0)


@pytest.mark.parametrize("count", [-1, 0, 4, 5])
def test_some_layers_go_and_some_stay(count: int) -> None:
    with pytest.raises(ValueError, match=f"expected to drop 1 to 3 of 4 layers, found {count}"):
        layers_to_drop(torch.zeros(4), count)
    with pytest.raises(ValueError, match=f"expected to drop 1 to 3 of 4 layers, found {count}"):
        search_block(4, count, lambda _: 0.0)


def test_removal_loss_is_the_loss_after_dropping(batch: Batch) -> None:
    model = cut_model("llama")
    batches = [batch, tiny_batch(LONGER)]
    before = [p.clone() for p in model.parameters()]
    found = removal_loss(model, batches, [1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    drop_layers(model, layers=[1])
    losses = [F.cross_entropy(answer_logits(model, one), answer_labels(one), reduction="none") for one in batches]
    assert found == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_processes_together_have_one_removal_loss(batch: Batch) -> None:
    """The batches differ in their answer tokens, so a mean of means would not do."""
    model, other, sent = cut_model("llama"), tiny_batch(LONGER), []
    removal_loss(model, [other], [0], total=lambda x: sent.append(x.clone()) or x)  # type: ignore[func-returns-value]
    together = removal_loss(model, [batch], [0], total=lambda x: x + sent[0])
    assert together == pytest.approx(removal_loss(model, [batch, other], [0]), rel=1e-6)
