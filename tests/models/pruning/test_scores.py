"""Activation importance against a recomputation token by token, and nothing left behind."""

import pytest
import torch
from tiny import tiny_batch
from torch import nn
from transformers import PreTrainedModel

from models.architecture import decoder_layers
from models.forward import Batch
from models.pruning import activation_scores, top_indices

LONGER = [("one two three four", "five six"), ("?", "!")]


def naive_scores(model: PreTrainedModel, batches: list[Batch]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each sample alone, without padding; the inputs of both projections recorded by replacing their `forward`."""
    layers = decoder_layers(model)
    neurons = [torch.zeros(layer.num_neurons, dtype=torch.double) for layer in layers]
    groups = [torch.zeros(layer.num_kv_groups, dtype=torch.double) for layer in layers]
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen: dict[tuple[int, str], torch.Tensor] = {}
            for layer in layers:
                for kind, module in (("mlp", layer.mlp.down_proj), ("attention", layer.attention.o_proj)):

                    def record(x, key=(layer.index, kind), module=module):
                        seen[key] = x.detach()[0].double()
                        return nn.functional.linear(x, module.weight, module.bias)

                    module.forward = record
            with torch.no_grad():
                model(ids[mask.bool()][None])
            for layer in layers:
                del layer.mlp.down_proj.forward, layer.attention.o_proj.forward
                neurons[layer.index] += seen[layer.index, "mlp"].abs().mean(0) ** 2
                for group in range(layer.num_kv_groups):
                    width = layer.attention.o_proj.weight.shape[1] // layer.num_kv_groups
                    part = seen[layer.index, "attention"][:, group * width : (group + 1) * width]
                    groups[layer.index][group] += part.norm(dim=1).mean() ** 2
    return [s.sqrt().float() for s in neurons], [s.sqrt().float() for s in groups]


def test_scores_are_those_of_the_samples_alone(model: PreTrainedModel, batch: Batch) -> None:
    batches = [batch, tiny_batch(LONGER)]
    assert all((b["attention_mask"] == 0).any() for b in batches), "padding must be there to be left out"
    scores = activation_scores(model, batches)
    neurons, groups = naive_scores(model, batches)
    torch.testing.assert_close(scores.neurons, neurons, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.kv_groups, groups, rtol=1e-4, atol=1e-6)
    assert all(s.dtype == torch.float32 for s in scores.neurons + scores.kv_groups)


def test_processes_together_score_all_their_batches(model: PreTrainedModel, batch: Batch) -> None:
    """Two halves of the batches, summed as processes would sum them, against all batches in one process."""
    sent: list[torch.Tensor] = []

    def send(squares: torch.Tensor) -> torch.Tensor:
        sent.append(squares.clone())
        return squares

    activation_scores(model, [tiny_batch(LONGER)], total=send)
    halves = activation_scores(model, [batch], total=lambda squares: squares + sent[0])
    together = activation_scores(model, [batch, tiny_batch(LONGER)])
    torch.testing.assert_close(halves.neurons, together.neurons)
    torch.testing.assert_close(halves.kv_groups, together.kv_groups)


def test_padding_tokens_do_not_matter(model: PreTrainedModel, batch: Batch) -> None:
    other = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 17)
    assert not torch.equal(other, batch["input_ids"])
    a, b = activation_scores(model, [batch]), activation_scores(model, [{**batch, "input_ids": other}])
    assert all(torch.equal(x, y) for x, y in zip(a.neurons + a.kv_groups, b.neurons + b.kv_groups, strict=True))


def test_a_dead_neuron_scores_zero(model: PreTrainedModel, batch: Batch) -> None:
    with torch.no_grad():
        decoder_layers(model)[1].mlp.up_proj.weight[5] = 0
        decoder_layers(model)[0].attention.v_proj.weight[8:16] = 0  # the second group
    scores = activation_scores(model, [batch])
    assert scores.neurons[1][5] == 0
    assert (scores.neurons[1] > 0).sum() == 47
    assert scores.kv_groups[0][1] == 0
    assert scores.kv_groups[0][0] > 0


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(model: PreTrainedModel, batch: Batch, training: bool) -> None:
    model.train(training)
    activation_scores(model, [batch])
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_go_and_the_mode_returns_when_a_batch_fails(model: PreTrainedModel) -> None:
    model.train()
    with pytest.raises(KeyError):
        activation_scores(model, [{"input_ids": torch.zeros(1, 1)}])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_batch_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="expected at least one calibration batch, found none"):
        activation_scores(model, [])


def test_dropout_is_off_while_scoring(model: PreTrainedModel, batch: Batch) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    a, b = activation_scores(model, [batch]), activation_scores(model, [batch])
    assert torch.equal(a.neurons[1], b.neurons[1])


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([1.0, 3.0, 2.0, 0.0], 2, [1, 2]),
        ([5.0, 1.0, 4.0], 3, [0, 1, 2]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, 2.0, 1.0, 2.0, 1.0, 1.0], 3, [1, 2, 3]),
    ],
)
def test_top_indices_ascend_and_ties_go_to_the_lower(scores: list[float], count: int, expected: list[int]) -> None:
    assert top_indices(torch.tensor(scores), count) == expected


def test_ties_are_stable_in_long_tensors() -> None:
    scores = torch.arange(1000) % 2
    assert top_indices(scores.float(), 100) == list(range(1, 200, 2))
