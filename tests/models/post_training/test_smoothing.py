"""Folding leaves a model's answers as they are, in all families; the factors are those of the papers, and the search helps."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.architecture import FAMILIES, decoder_layers
from models.forward import answer_logits
from models.post_training.kernels import kernel_block, rounded_in_blocks
from models.post_training.rounding import nearest
from models.post_training.smoothing import Pair, best_factors, fold, pairs_of, smoothing_factors
from models.quantization.fake_quantize import fake_quantize
from models.quantization.formats import FORMATS, Format, Grid
from tests.helpers.tiny import tiny_batch, tiny_model

families = pytest.mark.parametrize("family", FAMILIES)
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}}  # Qwen2 has them in any case


def rough_factors(pair: Pair) -> Tensor:
    generator = torch.Generator().manual_seed(pair.num_channels)
    return (2 * torch.randn(pair.num_channels, generator=generator)).exp()


def model_of(family: str) -> PreTrainedModel:
    return tiny_model(family, **BIASES.get(family, {}))


@families
@pytest.mark.parametrize("number", range(4), ids=["norm to qkv", "v to o", "norm to gate and up", "up to down"])
@torch.no_grad()
def test_folding_changes_no_answer(family: str, number: int) -> None:
    model, batch = model_of(family), tiny_batch()
    before_NV = answer_logits(model, batch)
    for layer in decoder_layers(model):
        pair = pairs_of(layer)[number]
        weights = [reader.weight.clone() for reader in pair.readers]
        fold(pair, rough_factors(pair))
        assert all(not torch.equal(reader.weight, weight) for reader, weight in zip(pair.readers, weights, strict=True))
    torch.testing.assert_close(answer_logits(model, batch), before_NV, rtol=1e-3, atol=1e-3)


@families
def test_every_projection_reads_one_pair(family: str) -> None:
    for layer in decoder_layers(model_of(family)):
        readers = [reader for pair in pairs_of(layer) for reader in pair.readers]
        assert readers == [getattr(owner, name) for owner, name in layer.linears()]


def test_query_heads_share_the_factors_of_their_values() -> None:
    pair = pairs_of(decoder_layers(tiny_model())[0])[1]  # four query heads on two groups of 8 channels
    assert pair.num_channels == 16
    assert pair.channel_I.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    largest_C = pair.largest(torch.arange(32.0))
    assert largest_C.tolist() == [*range(8, 16), *range(24, 32)]


def test_factors_are_those_of_smoothquant() -> None:
    inputs_C, weights_C = torch.tensor([10.0, 1.0, 0.1, 2.0]), torch.tensor([0.5, 0.2, 0.3, 0.1])
    factors_C = smoothing_factors(inputs_C, weights_C, 0.7)
    expected_C = inputs_C**0.7 / weights_C**0.3
    torch.testing.assert_close(factors_C / factors_C[0], expected_C / expected_C[0])
    torch.testing.assert_close(factors_C.prod(), torch.tensor(1.0))


def test_channels_without_inputs_or_weights_are_left_alone() -> None:
    factors_C = smoothing_factors(torch.tensor([4.0, 0.0, 1.0, 9.0]), torch.tensor([1.0, 1.0, 1.0, 0.0]), 0.5)
    torch.testing.assert_close(factors_C, torch.tensor([2**0.5, 1.0, 0.5**0.5, 1.0]))


def test_factors_are_bounded() -> None:
    factors_C = smoothing_factors(torch.tensor([1e20, 1e-20]), torch.ones(2), 1.0)
    assert factors_C.tolist() == pytest.approx([1e4, 1e-4])


def output_error(pair: Pair, input_SI: Tensor, format: Format) -> float:
    """What rounding to nearest changes in the outputs of a pair's readers."""
    total = 0.0
    for reader in pair.readers:
        weight_OI = reader.weight.detach()
        rounded_SI = rounded_in_blocks(input_SI, kernel_block(format.weight))
        if format.input is not None:
            scale = input_SI.abs().amax(1 if format.input.scales == "row" else None) / format.input.high
            rounded_SI = fake_quantize(input_SI, scale, None, format.input.numbers)
        rounded_OI = nearest(weight_OI, format.weight, search="max").weight_OI
        total += float((rounded_SI @ rounded_OI.T - input_SI @ weight_OI.T).square().sum())
    return total


SMALL_GROUPS = {f"{numbers} groups": Format(Grid(numbers, "group", 8)) for numbers in ("int8", "int4")}
SMOOTHED = {name: FORMATS[name] for name in ("int8", "int8_static")} | SMALL_GROUPS


@pytest.mark.parametrize("format", SMOOTHED.values(), ids=SMOOTHED)
@pytest.mark.parametrize("number", range(4), ids=["norm to qkv", "v to o", "norm to gate and up", "up to down"])
@torch.no_grad()
def test_the_search_makes_outliers_harmless(format: Format, number: int) -> None:
    model = tiny_model()
    pair = pairs_of(decoder_layers(model)[0])[number]
    input_SI = torch.randn(200, len(pair.channel_I), generator=torch.Generator().manual_seed(0))
    input_SI[:, pair.channel_I == 3] *= 50
    before = output_error(pair, input_SI, format)
    factor_C = best_factors(pair, input_SI, [format] * len(pair.readers))
    fold(pair, factor_C)
    assert output_error(pair, input_SI / factor_C[pair.channel_I], format) < 0.7 * before


@torch.no_grad()
def test_inputs_that_only_kernels_round_are_smoothed_too() -> None:
    """Weights of one size lose nothing by rounding, so all that factors can improve is what kernels do to the inputs."""
    pair = pairs_of(decoder_layers(tiny_model())[0])[0]
    draw = torch.Generator().manual_seed(0)
    for reader in pair.readers:
        reader.weight.copy_(torch.randn(reader.weight.shape, generator=draw).sign())
    input_SI = torch.randn(50, 32, generator=draw)
    input_SI[:, 3] *= 50
    factor_C = best_factors(pair, input_SI, [SMALL_GROUPS["int8 groups"]] * 3)
    assert factor_C[3] > 2 * factor_C[torch.arange(32) != 3].amax()


@torch.no_grad()
def test_the_search_may_find_that_nothing_helps() -> None:
    """Inputs and weights of one size each: every factor but 1 makes some of them larger than others."""
    model = tiny_model()
    pair = pairs_of(decoder_layers(model)[0])[0]
    signs = torch.Generator().manual_seed(0)
    for reader in pair.readers:
        reader.weight.copy_(torch.randn(reader.weight.shape, generator=signs).sign())
    input_SI = torch.randn(50, 32, generator=signs).sign()
    assert torch.equal(best_factors(pair, input_SI, [FORMATS["int8"]] * 3), torch.ones(32))
