"""Quantizers observe, freeze and travel in the state dict; quantized layers keep their parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.quantization import (
    FakeQuantizedLinear,
    Grid,
    InputQuantizer,
    fake_quantize,
    freeze_inputs,
    freeze_scales,
    freeze_weights,
    merge_observations,
    quantized_linears,
    scale_from_amax,
)


@pytest.fixture
def layer() -> FakeQuantizedLinear:
    torch.manual_seed(0)
    return FakeQuantizedLinear(nn.Linear(6, 4))


@pytest.fixture
def x() -> torch.Tensor:
    return 3 * torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


FP8 = Grid("fp8_e4m3")


def frozen_quantizer(amax: float) -> InputQuantizer:
    quantizer = InputQuantizer(FP8)
    quantizer(torch.tensor([0.1, -amax]))
    quantizer.freeze()
    return quantizer


def test_observing_passes_through_and_records_the_largest_magnitude() -> None:
    quantizer = InputQuantizer(FP8)
    for values, largest in (([1.0, -3.0], 3.0), ([2.0], 3.0), ([3.5, 0.0], 3.5)):
        x = torch.tensor(values)
        assert torch.equal(quantizer(x), x)
        quantizer.merge()
        assert quantizer.amax.item() == largest
    assert quantizer.histogram.sum() == 5
    assert (quantizer.scale.item(), quantizer.frozen) == (0.0, False)


def test_frozen_rounds_and_observes_no_more() -> None:
    quantizer = frozen_quantizer(3.5)
    assert quantizer.frozen
    assert torch.equal(quantizer.scale, scale_from_amax(torch.tensor(3.5)))
    x = torch.randn(100) * 10
    assert torch.equal(quantizer(x), fake_quantize(x, quantizer.scale))
    assert quantizer.amax.item() == 3.5


def test_evaluation_observes_nothing() -> None:
    """Held-out data must not set the scales."""
    quantizer = InputQuantizer(FP8).eval()
    x = torch.tensor([5.0])
    assert torch.equal(quantizer(x), x)
    assert quantizer.pending is None
    assert quantizer.train()(x) is x
    quantizer.merge()
    assert quantizer.amax == 5


def test_observing_bfloat16_stays_in_float32() -> None:
    quantizer = InputQuantizer(FP8)
    x = torch.tensor([1.5], dtype=torch.bfloat16)
    assert quantizer(x).dtype == torch.bfloat16
    quantizer.merge()
    assert (quantizer.amax.dtype, quantizer.amax.item()) == (torch.float32, 1.5)


def test_freezing_without_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a quantizer that has observed data, found one with a range of 0"):
        InputQuantizer(FP8).freeze()


def test_state_dict_restores_what_was_frozen() -> None:
    original, restored = frozen_quantizer(3.5), InputQuantizer(FP8)
    assert set(original.state_dict()) == {"amax", "histogram", "scale"}
    restored.load_state_dict(original.state_dict())
    assert restored.frozen
    x = torch.randn(100)
    assert torch.equal(restored(x), original(x))
    assert not torch.equal(restored(x), x)

    restored.load_state_dict(InputQuantizer(FP8).state_dict())
    assert not restored.frozen
    assert torch.equal(restored(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_leave_scales_alone(
    layer: FakeQuantizedLinear, x: torch.Tensor, dtype: torch.dtype
) -> None:
    layer(x)
    merge_observations(layer)
    layer.input_quantizer.amax.fill_(1 / 3)  # no number of a half precision type
    freeze_scales(layer)
    before = copy.deepcopy(layer.input_quantizer)
    layer.to(dtype)
    after = layer.input_quantizer
    assert layer.weight.dtype == dtype
    assert (after.amax.dtype, after.scale.dtype) == (torch.float32, torch.float32)
    assert torch.equal(after.amax, before.amax)
    assert torch.equal(after.scale, before.scale)
    assert after.frozen
    assert dict(layer.named_buffers()).keys() == {
        *(f"input_quantizer.{name}" for name in ("amax", "histogram", "scale")),
        "weight_quantizer.scale",
    }


def test_layer_takes_over_the_same_parameters() -> None:
    linear = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(linear.parameters())
    layer = FakeQuantizedLinear(linear.eval())
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert [id(p) for p in layer.parameters()] == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert (layer.in_features, layer.out_features, layer.training) == (6, 4, False)
    assert not FakeQuantizedLinear(linear.train()).input_quantizer.frozen
    assert FakeQuantizedLinear(nn.Linear(6, 4, bias=False)).bias is None


def test_layer_computes_with_both_operands_on_their_grids(layer: FakeQuantizedLinear, x: torch.Tensor) -> None:
    plain = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)

    assert freeze_scales(layer) == 2
    input_scale, weight_scale = scale_from_amax(x.abs().max()), scale_from_amax(layer.weight.detach().abs().max())
    expected = F.linear(fake_quantize(x, input_scale), fake_quantize(layer.weight, weight_scale), layer.bias)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(expected, plain)


def test_gradients_reach_weight_bias_and_input(layer: FakeQuantizedLinear, x: torch.Tensor) -> None:
    layer(x)
    freeze_scales(layer)
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    on_grid = layer.input_quantizer(x).detach()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, on_grid.sum(0).expand(4, 6))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight_quantizer(layer.weight).detach().sum(0).expand(10, 6))


def test_freeze_measures_weights_as_they_are_now(layer: FakeQuantizedLinear, x: torch.Tensor) -> None:
    """Training goes on while quantizers observe, and weights may have shrunk since their largest was seen."""
    with torch.no_grad():
        layer.weight.mul_(100)
        layer(x)
        layer.weight.div_(100)
    freeze_scales(layer)
    assert torch.equal(layer.weight_quantizer.scale, scale_from_amax(layer.weight.detach().abs().max()))


def test_freezing_again_changes_nothing(layer: FakeQuantizedLinear, x: torch.Tensor) -> None:
    layer(x)
    assert freeze_scales(layer) == 2
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer.weight.mul_(2)
    assert freeze_scales(layer) == 0
    assert torch.equal(layer.weight_quantizer.scale, before["weight_quantizer.scale"])


def test_observations_of_other_processes_are_merged_until_frozen(layer: FakeQuantizedLinear, x: torch.Tensor) -> None:
    model = nn.Sequential(layer, FakeQuantizedLinear(nn.Linear(3, 3)))
    layer.train()(x)
    ours = float(x.abs().max())
    elsewhere = torch.tensor([ours / 2, 100.0])

    def reduce(tensor: torch.Tensor, operation: str) -> torch.Tensor:
        return torch.maximum(tensor, elsewhere) if operation == "max" else 2 * tensor

    merge_observations(model, reduce)
    assert float(layer.input_quantizer.amax) == ours
    assert int(layer.input_quantizer.histogram.sum()) == 2 * x.numel()
    assert float(model[1].input_quantizer.amax) == 100
    merge_observations(model)  # nothing new: nothing is counted twice
    assert int(layer.input_quantizer.histogram.sum()) == 2 * x.numel()
    layer.input_quantizer.freeze()
    merge_observations(model, lambda tensor, operation: tensor + 1)
    assert float(layer.input_quantizer.amax) == ours
    merge_observations(layer, lambda tensor, operation: pytest.fail("nobody observes"))


def test_weights_can_be_rounded_before_inputs(layer: FakeQuantizedLinear, x: torch.Tensor) -> None:
    layer(x)
    assert freeze_weights(layer) == 1
    expected = F.linear(x, fake_quantize(layer.weight, layer.weight_quantizer.scale), layer.bias)
    assert torch.equal(layer(2 * x), F.linear(2 * x, layer.weight_quantizer(layer.weight), layer.bias))
    assert torch.equal(layer(x), expected)
    assert freeze_inputs(layer) == 1
    assert torch.equal(layer.input_quantizer.scale, scale_from_amax(2 * x.abs().max()))


def test_quantized_layers_are_found_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(FakeQuantizedLinear(nn.Linear(2, 2))))
    assert quantized_linears(model) == {"1.0": model[1][0]}
