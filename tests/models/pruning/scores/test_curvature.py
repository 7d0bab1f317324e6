"""Gram and Fisher matrices against explicit loops over tokens, and their product against a measured KL divergence."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import FAMILIES, decoder_layers
from models.forward import answer_logits
from models.generation.sampling import seed_of
from models.pruning.scores.curvature import FISHER_EVERY, Curvature, LayerCurvature, collect_curvature
from tests.helpers.tiny import tiny_batch, tiny_model

OTHER = [("one two three four", "five six"), ("?", "!")]


def flat(curvature: Sequence[LayerCurvature]) -> list[Tensor]:
    parts = [part for layer in curvature for part in (layer.o_proj, layer.down_proj)]
    return [matrix for part in parts for matrix in (part.gram_PP, part.fisher_DD) if matrix is not None]


def close(found: Sequence[LayerCurvature], expected: Sequence[LayerCurvature], tolerance: float = 1e-5) -> None:
    for a, b in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def num_answers(batch: Batch) -> int:
    return int((batch["labels"] != -100).sum())


def num_tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].sum())


def drawn_labels(model: PreTrainedModel, batch: Batch, seed: int, number: int) -> Tensor:
    """The labels (B, T) that the collection draws, at the places where the batch has answers."""
    with torch.no_grad():
        probabilities = answer_logits(model, batch).float().softmax(-1)
    generator = torch.Generator().manual_seed(seed_of("fisher", seed, number))
    labels = torch.full_like(batch["labels"], -100)
    answers = torch.zeros_like(labels, dtype=torch.bool)
    answers[:, 1:] = batch["labels"][:, 1:] != -100
    labels[answers] = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return labels


def explicit(model: PreTrainedModel, batches: Sequence[Batch], seed: int) -> list[LayerCurvature]:
    """Sample after sample, without its padding, token after token."""
    linears = [linear for layer in decoder_layers(model) for linear in (layer.o_proj, layer.down_proj)]
    grams = [torch.zeros(linear.weight.shape[1], linear.weight.shape[1], dtype=torch.float64) for linear in linears]
    fishers = [torch.zeros(linear.weight.shape[0], linear.weight.shape[0], dtype=torch.float64) for linear in linears]
    tokens = answers = 0
    for number, batch in enumerate(batches):
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"].bool(), drawn_labels(model, batch, seed, number), strict=True
        ):
            seen: dict = {}
            hooks = [
                linear.register_forward_hook(lambda m, args, out: seen.update({m: (args[0], out)}))
                for linear in linears
            ]
            logits = model(ids[mask][None]).logits[0]
            for hook in hooks:
                hook.remove()
            loss = F.cross_entropy(logits[:-1], labels[mask][1:], reduction="sum", ignore_index=-100)
            gradients = torch.autograd.grad(loss, [seen[linear][1] for linear in linears])
            learns = number % FISHER_EVERY == 0
            for gram, fisher, linear, gradient in zip(grams, fishers, linears, gradients, strict=True):
                for x, g in zip(seen[linear][0][0].detach().double(), gradient[0].double(), strict=True):
                    gram += torch.outer(x, x)
                    fisher += learns * torch.outer(g, g)
            tokens += int(mask.sum()) * learns
            answers += int((labels != -100).sum())
    parts = [Curvature(gram / answers, fisher / tokens) for gram, fisher in zip(grams, fishers, strict=True)]
    return [LayerCurvature(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_by_their_definition(family: str) -> None:
    model, batches = tiny_model(family), [*[tiny_batch(OTHER)] * FISHER_EVERY, tiny_batch()]
    found = collect_curvature(model, batches, seed=3)
    assert all(matrix.dtype == torch.float64 for matrix in flat(found))
    close(found, explicit(model, batches, seed=3), 1e-4)


def test_labels_depend_on_the_seed_and_the_grams_do_not(model: PreTrainedModel, batch: Batch) -> None:
    one, two = (collect_curvature(model, [batch], seed=seed) for seed in (0, 1))
    assert torch.equal(one[1].o_proj.gram_PP, two[1].o_proj.gram_PP)
    assert not torch.allclose(one[1].o_proj.fisher_DD, two[1].o_proj.fisher_DD, rtol=0.1)


def test_padding_does_not_count(model: PreTrainedModel, batch: Batch) -> None:
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    other = {**batch, "input_ids": torch.where(mask, batch["input_ids"], 17)}
    close(collect_curvature(model, [other]), collect_curvature(model, [batch]))


def test_a_batch_without_answers_adds_inputs_and_no_gradients(model: PreTrainedModel, batch: Batch) -> None:
    silent = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    once, twice = collect_curvature(model, [batch]), collect_curvature(model, [batch, *[silent] * FISHER_EVERY])
    torch.testing.assert_close(twice[0].down_proj.gram_PP, (1 + FISHER_EVERY) * once[0].down_proj.gram_PP)
    torch.testing.assert_close(twice[0].down_proj.fisher_DD, once[0].down_proj.fisher_DD / 2)
    with pytest.raises(ValueError, match="expected calibration batches with answer tokens, found none"):
        collect_curvature(model, [silent])
    with pytest.raises(ValueError, match="expected at least one calibration batch, found none"):
        collect_curvature(model, [])


def test_two_processes_together_have_all_statistics(model: PreTrainedModel) -> None:
    """Of unlike numbers of tokens, so that a mean of the processes' means would not do."""
    sent: list[Tensor] = []

    def send(x: Tensor) -> Tensor:
        sent.append(x.clone())
        return x

    collect_curvature(model, [tiny_batch(OTHER)], total=send)
    received = iter(sent)
    together = collect_curvature(model, [tiny_batch()], total=lambda x: x + next(received))
    batches = [tiny_batch(), tiny_batch(OTHER)]
    alone = [flat(collect_curvature(model, [one])) for one in batches]
    answers, tokens = ([int(count(one)) for one in batches] for count in (num_answers, num_tokens))
    for index, (found, *parts) in enumerate(zip(flat(together), *alone, strict=True)):
        counts = tokens if index % 2 else answers  # Gram and Fisher matrices take turns
        expected = sum(part * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        torch.testing.assert_close(found, expected)


def test_the_model_is_left_as_it_was(model: PreTrainedModel, batch: Batch) -> None:
    model.train()
    model.model.layers[1].eval()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    F.cross_entropy(
        answer_logits(model, batch), torch.zeros(len(answer_logits(model, batch)), dtype=torch.long)
    ).backward()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    collect_curvature(model, [batch])
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert gradients and {name for name, p in model.named_parameters() if p.grad is not None} == set(gradients)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_frozen_model_and_one_in_inference_have_the_same(family: str, batch: Batch) -> None:
    model = tiny_model(family)
    expected = collect_curvature(model, [batch])
    model.requires_grad_(False)
    with torch.no_grad():
        close(collect_curvature(model, [batch]), expected, 1e-7)
    assert not any(p.requires_grad for p in model.parameters())


def test_sums_are_not_rounded_under_autocast(batch: Batch) -> None:
    """The inputs are, to bfloat16; sums of their products, rounded once more, would be further off than float32 is."""
    model = tiny_model()
    inputs: list[Tensor] = []
    down = decoder_layers(model)[0].down_proj
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = collect_curvature(model, [batch])
        hook = down.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
        answer_logits(model, batch)
        hook.remove()
    rows = inputs[0][batch["attention_mask"].bool()].double()
    answers = num_answers(batch)
    torch.testing.assert_close(found[0].down_proj.gram_PP * answers, rows.T @ rows, rtol=1e-4, atol=1e-2)
    exact = collect_curvature(model, [batch])
    for a, b in zip(flat(found)[::2], flat(exact)[::2], strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("projection", ["o_proj", "down_proj"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_estimate_is_near_the_measured_divergence(family: str, projection: str) -> None:
    """1/2 tr(d^T gram d fisher) for small random changes d of one projection after the other, many labels drawn."""
    torch.manual_seed(0)
    model, batch = tiny_model(family), tiny_batch()
    draws = [collect_curvature(model, [batch], seed=seed) for seed in range(30)]
    estimate = measured = 0.0
    for layer in decoder_layers(model):
        linear = getattr(layer, projection)
        parts = [getattr(curvature[layer.index], projection) for curvature in draws]
        fisher_DD = torch.stack([part.fisher_DD for part in parts]).mean(0)
        with torch.no_grad():
            dense = answer_logits(model, batch).double().log_softmax(-1)
            change_DP = 0.01 * linear.weight.std() * torch.randn_like(linear.weight)
            linear.weight += change_DP
            changed = answer_logits(model, batch).double().log_softmax(-1)
            linear.weight -= change_DP
        measured += float(F.kl_div(changed, dense, reduction="batchmean", log_target=True))
        d_PD = change_DP.T.double()
        estimate += float(torch.trace(d_PD.T @ parts[0].gram_PP @ d_PD @ fisher_DD)) / 2
    assert 0.5 < estimate / measured < 2
