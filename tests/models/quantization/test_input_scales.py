"""Scales of inputs: histograms, percentiles, squared errors, and one scale for each token."""

import pytest
import torch

from models.quantization import FORMATS, Grid, InputQuantizer, RowQuantizer, fake_quantize
from models.quantization.quantizers import row_scales
from models.quantization.scales import NUM_BINS, amax_from_histogram, histogram_of, scale_from_amax

INT8, FP8 = Grid("int8"), Grid("fp8_e4m3")


def test_histograms_count_magnitudes_in_64ths_of_octaves() -> None:
    x = torch.tensor([1.0, -1.0, 1.015, 1.016, 2.0, 0.0, 1e-38, 3e38])
    counts = histogram_of(x)
    assert counts.shape == (NUM_BINS,)
    assert int(counts.sum()) == 8
    one = 127 * 64
    assert (int(counts[one]), int(counts[one + 1]), int(counts[one + 64]), int(counts[0])) == (3, 1, 1, 1)


def test_a_percentile_leaves_out_the_rare_outlier() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[7] = 1000.0
    amax = amax_from_histogram(histogram_of(x), x.abs().max(), INT8, "percentile")
    exact = x.abs().quantile(0.9999)
    assert abs(float(amax / exact) - 1) < 0.02  # the width of a bin
    assert amax_from_histogram(histogram_of(x), x.abs().max(), INT8, "max") == 1000


@pytest.mark.parametrize("grid", [INT8, FP8], ids=lambda grid: grid.numbers)
def test_the_least_squared_error_is_near_the_best_there_is(grid: Grid) -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(1)) ** 3

    def error(amax: float) -> float:
        scale = scale_from_amax(torch.tensor(amax), grid.high)
        return float((fake_quantize(x, scale, None, grid.numbers) - x).square().sum())

    largest = float(x.abs().max())
    chosen = error(float(amax_from_histogram(histogram_of(x), x.abs().max(), grid, "mse")))
    best = min(error(share * largest) for share in torch.linspace(0.05, 2, 196).tolist())
    assert chosen <= 1.02 * best
    assert chosen < error(largest)


def test_a_large_value_that_comes_often_meets_a_code_of_fp8() -> None:
    """As the channel of a hidden state that has nearly the same value at every token, much larger than all others."""
    x = torch.cat([torch.full((1000,), 0.95), torch.randn(9000) * 0.01, torch.tensor([1.0])])
    amax = amax_from_histogram(histogram_of(x), x.abs().max(), FP8, "mse")
    scale = scale_from_amax(amax, FP8.high)
    assert abs(float(fake_quantize(x[:1], scale, None, "fp8_e4m3")) - 0.95) < 0.95 / 100  # up to 1/16 off the codes


def test_a_quantizer_uses_all_batches_for_its_percentile() -> None:
    quantizer = InputQuantizer(INT8).train()
    quantizer(torch.full((5000,), 1.0))
    quantizer(torch.full((4999,), 1.0))
    quantizer(torch.tensor([64.0]))
    quantizer.freeze("percentile")
    assert float(quantizer.scale) == pytest.approx((1 + 1 / 128) / 127, rel=1e-3)  # the middle of the bin of 1


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3_per_channel"])
def test_each_token_has_its_own_scale(name: str) -> None:
    grid = FORMATS[name].input
    assert grid is not None
    quantizer = RowQuantizer(grid)
    x_BTI = torch.randn(2, 3, 8) * torch.tensor([1e-3, 1.0, 1e3])[None, :, None]
    assert quantizer(x_BTI) is x_BTI
    quantizer.freeze()
    rounded = quantizer(x_BTI)
    for batch in range(2):
        for token in range(3):
            scale = x_BTI[batch, token].abs().max() / grid.high
            expected = fake_quantize(x_BTI[batch, token], scale, None, grid.numbers)
            assert torch.equal(rounded[batch, token], expected)
    assert torch.equal(quantizer(x_BTI[:, 1:2]), rounded[:, 1:2])  # whatever stands beside it
    assert quantizer(torch.zeros(1, 1, 8)).abs().sum() == 0
    restored = RowQuantizer(grid)
    restored.load_state_dict(quantizer.state_dict())
    assert torch.equal(restored(x_BTI), rounded)


def test_gradients_pass_the_scale_of_a_token_by() -> None:
    quantizer = RowQuantizer(Grid("int8", "row"))
    quantizer.freeze()
    x_NI = torch.randn(4, 8, requires_grad=True)
    upstream = torch.randn(4, 8)
    (quantizer(x_NI) * upstream).sum().backward()
    assert x_NI.grad is not None
    assert torch.equal(x_NI.grad, upstream)
    assert row_scales(x_NI.detach(), quantizer.grid).shape == (4,)
