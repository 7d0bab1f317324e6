"""Latent weights: the same codes, as near to the unrounded weight as they allow."""

import pytest
import torch
from tiny import tiny_batch, tiny_model

from models.quantization import FORMATS, WeightQuantizer
from models.quantization.latent import within_cells
from models.quantization.linear import quantized_linears
from models.quantization.post_training import PostTrainingQuantization, quantize_after_training

WEIGHTS = ["fp8_e4m3", "fp8_e4m3_per_channel", "int8", "int4_g32", "int4_g32_zp"]


def of_a_solver(format: str) -> tuple[WeightQuantizer, torch.Tensor, torch.Tensor]:
    """A quantizer, values on its grid that are not all the nearest ones, and the weight."""
    weight_OI = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(FORMATS[format].weight, weight_OI)
    quantizer.freeze(weight_OI, "mse")
    noise_OI = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    values_OI = quantizer.quantize(weight_OI * (1 + 0.1 * noise_OI) + 0.05 * noise_OI)
    assert not torch.equal(values_OI, quantizer.quantize(weight_OI))
    return quantizer, values_OI, weight_OI


@pytest.mark.parametrize("format", WEIGHTS)
def test_codes_stay_and_weights_come_as_near_as_they_may(format: str) -> None:
    quantizer, values_OI, weight_OI = of_a_solver(format)
    latent_OI = within_cells(quantizer, values_OI, weight_OI)
    assert torch.equal(quantizer.quantize(latent_OI), values_OI)
    same_OI = quantizer.quantize(weight_OI) == values_OI
    inside_OI = same_OI & (weight_OI.abs() <= values_OI.abs().amax())
    inside_OI &= (latent_OI != values_OI) | (weight_OI == values_OI)
    assert inside_OI.float().mean() > 0.1
    torch.testing.assert_close(latent_OI[inside_OI], weight_OI[inside_OI])
    # Where the code is another one than the nearest, a step of the search further and it changes.
    other_OI = ~same_OI & (latent_OI != values_OI)
    assert other_OI.float().mean() > 0.05
    beyond_OI = latent_OI + (weight_OI - values_OI) / 200
    assert (quantizer.quantize(beyond_OI) != values_OI)[other_OI].all()
    assert ((latent_OI - weight_OI).abs() <= (values_OI - weight_OI).abs() + 1e-6).all()


def test_the_last_codes_stay_on_the_grid() -> None:
    """Far beyond the range, small steps of an optimizer would not change a code for long."""
    weight_OI = torch.tensor([[1.0, 5.0, -5.0, 0.4]]).repeat(1, 8)
    quantizer = WeightQuantizer(FORMATS["int4_g32"].weight, weight_OI)
    quantizer.set_scales(torch.full((1, 1), 0.25))
    values_OI = quantizer.quantize(weight_OI)
    latent_OI = within_cells(quantizer, values_OI, weight_OI)
    assert values_OI[0, :4].tolist() == [1.0, 1.75, -2.0, 0.5]
    assert latent_OI[0, :4].tolist() == pytest.approx([1.0, 1.75, -2.0, 0.4])


@pytest.mark.parametrize("format", ["fp8_e4m3", "int4_g32"])
def test_a_latent_model_computes_the_same_and_lies_off_its_grid(format: str) -> None:
    models = []
    for latent in (False, True):
        model = tiny_model(hidden_size=64, intermediate_size=64, head_dim=16)
        quantize_after_training(model, [tiny_batch()], format, PostTrainingQuantization(latent=latent))
        models.append(model)
    batch = tiny_batch()
    outputs = [model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits for model in models]
    torch.testing.assert_close(outputs[1], outputs[0])
    for on_grid, latent in zip(*(quantized_linears(model).values() for model in models), strict=True):
        torch.testing.assert_close(latent.weight_quantizer(latent.weight), on_grid.weight)
        assert (latent.weight != on_grid.weight).float().mean() > 0.5
