"""Token weights against finite differences of the loss."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.architecture import FAMILIES, decoder_layers
from models.calibration import sensitivity
from models.calibration.sensitivity import readers_of, token_weights
from models.forward import answer_logits
from models.generation.sampling import seed_of
from models.post_training.calibrate import quantize_after_training
from models.post_training.settings import PostTrainingQuantization
from models.quantization import quantized_linears
from tests.helpers.tiny import tiny_batch, tiny_model

STEP = 1e-2  # norms compute in float32


@pytest.mark.parametrize("position", range(4), ids=["qkv", "o", "gate and up", "down"])
def test_weights_are_squared_gradients_of_drawn_labels(position: int) -> None:
    model, batch = tiny_model().double(), tiny_batch([("2+2?", "Four."), ("a", "bcd")])
    logits_NV = answer_logits(model, batch).detach().float()
    generator = torch.Generator().manual_seed(seed_of("sensitivity", 7))
    labels_N = torch.multinomial(logits_NV.softmax(-1), 1, generator=generator).squeeze(1)
    linears, sample, token = readers_of(decoder_layers(model)[0])[position], 0, 3

    def loss(moved: object, output: int, by: float) -> float:
        def move(_: object, inputs: tuple[Tensor, ...], found: Tensor) -> Tensor:
            found = found.clone()
            found[sample, token, output] += by
            return found

        handle = moved.register_forward_hook(move)  # type: ignore[attr-defined]
        with torch.no_grad():
            value = F.cross_entropy(answer_logits(model, batch), labels_N, reduction="sum").item()
        handle.remove()
        return value

    expected = sum(
        ((loss(linear, output, STEP) - loss(linear, output, -STEP)) / (2 * STEP)) ** 2
        for linear in linears
        for output in range(linear.weight.shape[0])  # type: ignore[union-attr, index]
    )
    found = token_weights(model, batch, seed=7)[0][position][sample, token]
    assert found.item() == pytest.approx(expected, rel=1e-2)
    assert expected > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_family_has_weights_where_errors_can_matter(family: str, frozen: bool) -> None:
    model, batch = tiny_model(family).requires_grad_(not frozen), tiny_batch()
    weights = token_weights(model, batch)
    assert len(weights) == 2
    mask_BT, predicts_BT = batch["attention_mask"].bool(), F.pad(batch["labels"][:, 1:] != -100, (0, 1))
    for weight_BT in (weight for layer in weights for weight in layer):
        assert weight_BT.shape == mask_BT.shape
        assert (weight_BT[~mask_BT] == 0).all()
        assert (weight_BT[predicts_BT] > 0).all()
    assert model.training is False
    assert all(parameter.grad is None for parameter in model.parameters())
    again = token_weights(model, batch)
    assert all(
        torch.equal(a, b) for one, two in zip(weights, again, strict=True) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("tokens", [1, 30])
def test_pieces_of_a_batch_have_the_weights_of_the_whole(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws, one piece after the other; and what calibration reads beside is of the whole batch."""
    model, batch = tiny_model(), tiny_batch()
    whole = token_weights(model, batch, seed=3)
    monkeypatch.setattr(sensitivity, "_TOKENS_AT_ONCE", tokens)
    for layer, expected in zip(token_weights(model, batch, seed=3), whole, strict=True):
        for weight_BT, expected_BT in zip(layer, expected, strict=True):
            torch.testing.assert_close(weight_BT, expected_BT, rtol=1e-4, atol=1e-9)
    quantize_after_training(model, [batch], "int8", PostTrainingQuantization(method="gptq"))
    assert all(linear.weight_quantizer.frozen for linear in quantized_linears(model).values())
