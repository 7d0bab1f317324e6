"""Compensation: the least-squares weight by its definition, aims of readers and writers, and a stream that comes closer for it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import FAMILIES, decoder_layers
from models.calibration.observe import hooked
from models.calibration.sensitivity import readers_of
from models.post_training import weight_solver
from models.post_training.calibrate import quantize_after_training
from models.post_training.compensation import compensating
from models.post_training.settings import Method, PostTrainingQuantization
from models.quantization.linear import quantized_linears
from tests.helpers.tiny import tiny_batch, tiny_model

BATCHES = [tiny_batch(), tiny_batch([("one two three four", "five six"), ("?", "!")])]


def test_compensating_is_ridge_regression() -> None:
    """Every input is pulled back in proportion to its own energy, and a little by that of all."""
    generator = torch.Generator().manual_seed(5)
    weight_OI, x_SI, y_SO = (torch.randn(*shape, generator=generator) for shape in ((3, 5), (40, 5), (40, 3)))
    x_SI = x_SI * torch.tensor([1.0, 2.0, 0.1, 5.0, 1.0])
    energy_I = x_SI.square().sum(0)
    pull_II = (0.3 * energy_I + 0.01 * energy_I.mean()).sqrt().diag()
    expected_OI = torch.linalg.lstsq(torch.cat([x_SI, pull_II]), torch.cat([y_SO, pull_II @ weight_OI.T])).solution.T
    found_OI = compensating(weight_OI, x_SI.T @ x_SI, x_SI.T @ y_SO, ridge=0.3)
    torch.testing.assert_close(found_OI, expected_OI, rtol=1e-4, atol=1e-5)


def test_what_needs_no_compensation_keeps_the_weight() -> None:
    weight_OI, x_SI = torch.randn(3, 5), torch.randn(40, 5)
    x_SI[:, 2] = 0  # an input that is always zero
    found_OI = compensating(weight_OI, x_SI.T @ x_SI, x_SI.T @ (x_SI @ weight_OI.T))
    torch.testing.assert_close(found_OI, weight_OI)


def passing(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """By the name of a module: what it is given and what it returns at valid tokens, (S, I) and (S, O)."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.setdefault(name, []).append((inputs[0][mask_BT], output[mask_BT]))

    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: note(name, inputs, output))
        for name, module in model.base_model.named_modules()
        if name.endswith(("_proj", "layernorm"))
    ]
    with torch.no_grad(), hooked(handles):
        for batch in BATCHES:
            mask_BT = batch["attention_mask"].bool()
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return {name: (torch.cat([i for i, _ in both]), torch.cat([o for _, o in both])) for name, both in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_aim_at_the_dense_outputs_and_writers_at_what_the_stream_lacks(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[Tensor] = []

    def spy(weight_OI: Tensor, gram_II: Tensor, product_IO: Tensor) -> Tensor:
        products.append(product_IO)
        return compensating(weight_OI, gram_II, product_IO)

    monkeypatch.setattr(weight_solver, "compensating", spy)
    dense = tiny_model(family)
    for linear in dense.modules():
        if isinstance(linear, nn.Linear) and linear.bias is not None:
            nn.init.normal_(linear.bias, std=0.1)  # fresh ones are zero
    model = copy.deepcopy(dense)
    settings = PostTrainingQuantization("gptq", smoothing=(), sensitive=False, compensate=True)
    quantize_after_training(model, BATCHES, "int8_weight_only", settings)
    before, after = passing(dense), passing(model)
    names = {module: name for name, module in model.base_model.named_modules()}
    asked = iter(products)
    for layer in decoder_layers(model):
        for position, linears in enumerate(readers_of(layer)):
            norm = names[layer.stream_norms[position // 2]]
            for linear in linears:
                aim_SO = before[names[linear]][1]
                if position % 2 and not layer.output_norms:
                    lacking_SD = before[norm][0] - after[norm][0]  # of the stream, in front of this half
                    aim_SO = aim_SO + lacking_SD
                if linear.bias is not None:
                    aim_SO = aim_SO - linear.bias
                expected_IO = after[names[linear]][0].T @ aim_SO
                torch.testing.assert_close(next(asked).float(), expected_IO, rtol=1e-3, atol=1e-3)
    assert next(asked, None) is None


@torch.no_grad()
def stream(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The residual stream (S, D) behind the last layer, in front of the final norm."""
    seen: list[Tensor] = []
    with hooked([model.base_model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return seen[0][batch["attention_mask"].bool()]


@pytest.mark.parametrize("method", ["nearest", "gptq", "quantease"])
def test_the_stream_comes_closer_and_weights_lie_on_their_grids(method: Method) -> None:
    dense = tiny_model(hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=32)
    errors = []
    for compensate in (False, True):
        model = copy.deepcopy(dense)
        settings = PostTrainingQuantization(method, smoothing=(), compensate=compensate)
        quantize_after_training(model, BATCHES, "int4_g32", settings)
        for linear in quantized_linears(model).values():
            assert torch.equal(linear.weight_quantizer(linear.weight), linear.weight)
        errors.append(sum(float((stream(model, b) - stream(dense, b)).square().sum()) for b in BATCHES))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize(
    ("settings", "format", "compensates"),
    [
        (PostTrainingQuantization(), "int4_g128", True),
        (PostTrainingQuantization("gptq"), "int8_weight_only", True),
        (PostTrainingQuantization("nearest"), "int4_g128", False),
        (PostTrainingQuantization(), "int8", False),
        (PostTrainingQuantization(), "fp8_e4m3", False),
        (PostTrainingQuantization(compensate=True), "fp8_e4m3", True),
        (PostTrainingQuantization(compensate=False), "int4_g128", False),
    ],
)
def test_weights_alone_compensate_unless_told(
    settings: PostTrainingQuantization, format: str, compensates: bool
) -> None:
    assert settings.compensates(format) == compensates
