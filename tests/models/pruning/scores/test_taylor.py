"""First-order Taylor scores against finite differences of the loss, measured with one unit a little larger and a little smaller."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import FAMILIES, decoder_layers
from models.pruning.scores.first_order import ImportanceScores, taylor_scores
from tests.helpers.tiny import tiny_batch, tiny_model

STEP = 0.01


def sample_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """-log p of each sample's answer, (B,), from the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).double(), batch["labels"][:, 1:], reduction="none")
    return losses.sum(1)


def slopes(model: PreTrainedModel, batch: Batch, modules: list[nn.Module], channels: slice, *, output: bool) -> Tensor:
    """Central difference of the losses in a factor on some channels of the modules' inputs or outputs, (B,)."""
    ends = []
    for factor in (1 + STEP, 1 - STEP):

        def scale(x: Tensor, factor=factor) -> Tensor:
            x = x.clone()
            x[..., channels] *= factor
            return x

        hooks = [
            module.register_forward_hook(lambda m, inputs, y: scale(y))
            if output
            else module.register_forward_pre_hook(lambda m, inputs: (scale(inputs[0]),))
            for module in modules
        ]
        ends.append(sample_losses(model, batch))
        for hook in hooks:
            hook.remove()
    return (ends[0] - ends[1]) / (2 * STEP)


def flat(scores: ImportanceScores) -> Tensor:
    return torch.cat([*scores.neurons, *scores.query_heads, *scores.kv_groups, scores.hidden])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_slopes_of_the_loss(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    scores = taylor_scores(model, [batch])
    found, expected = [], []
    for layer in decoder_layers(model):
        for units, module, chosen in (
            (scores.neurons, layer.down_proj, (0, 7, 47)),
            (scores.query_heads, layer.o_proj, range(4)),
            (scores.kv_groups, layer.o_proj, range(2)),
        ):
            width = module.weight.shape[1] // len(units[layer.index])
            for u in chosen:
                found.append(units[layer.index][u])
                channels = slice(u * width, (u + 1) * width)
                expected.append(slopes(model, batch, [module], channels, output=False).norm())
    norms = [*(norm for layer in decoder_layers(model) for norm in layer.stream_norms), model.model.norm]
    for channel in (0, 5, 31):
        found.append(scores.hidden[channel])
        expected.append(slopes(model, batch, norms, slice(channel, channel + 1), output=True).norm())
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(expected), rtol=2e-3, atol=1e-4)


def test_samples_count_alone_whatever_batch_they_are_in(model: PreTrainedModel) -> None:
    pairs = [("2+2?", "Four."), ("Capital of France?", "Paris"), ("xyz" * 5, "no")]
    alone = taylor_scores(model, [tiny_batch([pair]) for pair in pairs])
    torch.testing.assert_close(flat(taylor_scores(model, [tiny_batch(pairs)])), flat(alone), rtol=1e-4, atol=1e-5)


def test_a_frozen_model_has_the_same_scores(model: PreTrainedModel, batch: Batch) -> None:
    expected = taylor_scores(model, [batch])
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(flat(taylor_scores(model, [batch])), flat(expected))


def test_a_batch_without_answers_adds_nothing(model: PreTrainedModel, batch: Batch) -> None:
    silent = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert torch.equal(flat(taylor_scores(model, [batch, silent])), flat(taylor_scores(model, [batch])))
    assert not flat(taylor_scores(model, [silent])).any()
