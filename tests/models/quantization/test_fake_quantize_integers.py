"""Integer grids, scales along an axis and in blocks, zero points: against the definition, value by value."""

import itertools

import pytest
import torch
from torch import Tensor

from models.quantization import FORMATS, codes_of, fake_quantize, weight_scales
from models.quantization.formats import RANGES


def naive(x: Tensor, scale: Tensor, zero_point: Tensor | None, numbers: str, axis: int, block_size: int) -> Tensor:
    """(clamp(round(x / s) + z, low, high) - z) * s, one number after the other."""
    low, high = RANGES[numbers]
    result = torch.empty_like(x)
    for position in itertools.product(*map(range, x.shape)):
        along_axis = (position[axis],) if scale.dim() else ()
        place = (*position[:-1], position[-1] // block_size) if block_size else along_axis
        s, z = scale[place], 0.0 if zero_point is None else float(zero_point[place])
        code = min(max(round(float(x[position] / s)) + z, low), high)  # Python, too, rounds to even
        result[position] = (code - z) * s
    return result


CASES = [
    ("int8", (), 0, 0, False),
    ("int8", (3,), 0, 0, False),
    ("int4", (3,), 0, 0, False),
    ("int4", (10,), 1, 0, True),
    ("int4", (3, 3), 0, 4, False),  # of ten values, the last block holds two
    ("int4", (3, 2), 0, 5, True),
    ("int8", (3, 5), 0, 2, True),
]


@pytest.mark.parametrize(("numbers", "shape", "axis", "block_size", "with_zero_points"), CASES)
def test_values_are_those_of_the_definition(
    numbers: str, shape: tuple[int, ...], axis: int, block_size: int, with_zero_points: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(3, 10, generator=generator)
    scale = 0.5 + torch.rand(shape, generator=generator)
    low, high = (int(end) for end in RANGES[numbers])
    zero_point = (
        torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8) if with_zero_points else None
    )
    ours = fake_quantize(x, scale, zero_point, numbers, axis, block_size)
    assert torch.equal(ours, naive(x, scale, zero_point, numbers, axis, block_size))
    codes = codes_of(x, scale, zero_point, numbers, axis, block_size)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert low <= int(codes.min()) <= int(codes.max()) <= high


def test_blocks_have_straight_gradients_too() -> None:
    x = torch.randn(3, 10, requires_grad=True)
    upstream = torch.randn(3, 10)
    (fake_quantize(x, torch.full((3, 3), 0.3), None, "int4", 0, 4) * upstream).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("search", ["max", "mse"])
def test_rounding_with_the_chosen_scales_again_changes_nothing(name: str, search: str) -> None:
    """An exported folder holds rounded weights and their scales, and is quantized again when it is loaded."""
    grid = FORMATS[name].weight
    weight_OI = torch.randn(6, 160, generator=torch.Generator().manual_seed(1)) ** 3
    scale, zero_point = weight_scales(weight_OI, grid, search)  # type: ignore[arg-type]
    once = fake_quantize(weight_OI, scale, zero_point, grid.numbers, 0, grid.group_size)
    assert torch.equal(fake_quantize(once, scale, zero_point, grid.numbers, 0, grid.group_size), once)
    assert torch.equal(scale.half().float(), scale)


@pytest.mark.parametrize("name", ["int4_g32", "int4_g64_zp", "int8", "fp8_e4m3"])
def test_a_search_never_does_worse_than_the_whole_range(name: str) -> None:
    grid = FORMATS[name].weight
    weight_OI = torch.randn(6, 160, generator=torch.Generator().manual_seed(2)) ** 3

    def error(search: str) -> float:
        scale, zero_point = weight_scales(weight_OI, grid, search)  # type: ignore[arg-type]
        rounded = fake_quantize(weight_OI, scale, zero_point, grid.numbers, 0, grid.group_size)
        return float((rounded - weight_OI).square().sum())

    assert error("mse") <= error("max")
    if grid.numbers == "int4":
        assert error("mse") < error("max")


def test_zero_points_cover_one_sided_groups() -> None:
    weight_OI = 1 + torch.rand(4, 64, generator=torch.Generator().manual_seed(3))
    errors = {}
    for name in ("int4_g32", "int4_g32_zp"):
        grid = FORMATS[name].weight
        scale, zero_point = weight_scales(weight_OI, grid)
        errors[name] = (fake_quantize(weight_OI, scale, zero_point, "int4", 0, 32) - weight_OI).abs().max()
    assert errors["int4_g32_zp"] < 0.6 * errors["int4_g32"]


def test_bits_count_what_is_stored() -> None:
    assert FORMATS["int4_g32"].weight.bits() == 4.5
    assert FORMATS["int4_g32_zp"].weight.bits() == 4.625
    assert FORMATS["int8"].weight.bits() == 8
