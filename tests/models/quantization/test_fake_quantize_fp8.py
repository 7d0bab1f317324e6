"""FP8 E4M3 against a table of every number the format can hold."""

import math

import pytest
import torch
from torch import Tensor

from models.quantization import Grid, fake_quantize, scale_from_amax

E4M3_MAX = Grid("fp8_e4m3").high


def decode(code: int) -> float:
    """One byte of E4M3 (1 sign, 4 exponent bits with bias 7, 3 mantissa bits) as a number, by the definition."""
    sign, exponent, mantissa = (-1) ** (code >> 7), (code >> 3) & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2**-6
    return sign * (1 + mantissa / 8) * 2 ** (exponent - 7)


POSITIVE = [decode(code) for code in range(127)]  # ascending, and code's last bit is the mantissa's last bit


def rounded(value: float) -> float:
    """The nearest representable number; of two equally near ones, that with the even code; beyond 448, 448."""
    magnitude = min(abs(value), E4M3_MAX)
    code = min(range(127), key=lambda code: (abs(POSITIVE[code] - magnitude), code & 1))
    return math.copysign(POSITIVE[code], value)


def naive(x: Tensor, scale: float) -> Tensor:
    """Division and multiplication are float32, as the definition says."""
    s = torch.tensor(scale)
    return torch.tensor([rounded(value) for value in (x.float() / s).tolist()]) * s


def interesting_values() -> Tensor:
    """All representable numbers, the points halfway between neighbours and just beside them, and numbers out of range."""
    grid = torch.tensor(POSITIVE)
    middles = (grid[1:] + grid[:-1]) / 2
    infinity = torch.tensor(math.inf)
    beside = torch.cat([torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)])
    beyond = torch.tensor([449.0, 463.9, 464.0, 480.0, 1e4, 1e30, 1e-12])
    draws = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 30
    positive = torch.cat([grid, middles, beside, beyond])
    return torch.cat([positive, -positive, draws])


def test_table_is_the_format() -> None:
    assert sorted(POSITIVE) == POSITIVE
    assert (POSITIVE[0], POSITIVE[1], POSITIVE[8], POSITIVE[-1]) == (0.0, 2**-9, 2**-6, 448.0)


@pytest.mark.parametrize("scale", [1.0, 0.25, 2**-14, 0.0123, 3.7])
def test_every_value_goes_to_its_nearest_neighbour(scale: float) -> None:
    x = interesting_values() * scale
    assert torch.equal(fake_quantize(x, torch.tensor(scale)), naive(x, scale))


def test_ties_go_to_the_even_code() -> None:
    x = torch.tensor([1.0625, 1.1875, 2.125, 2**-10, 3 * 2**-10])
    assert fake_quantize(x, torch.tensor(1.0)).tolist() == [1.0, 1.25, 2.0, 0.0, 2**-8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_divides_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = fake_quantize(x, torch.tensor(0.0123))
    assert ours.dtype == dtype
    assert torch.equal(ours, naive(x, 0.0123).to(dtype))


def test_values_out_of_range_are_clipped() -> None:
    x = torch.tensor([1e30, -1e30, math.inf, -math.inf])
    assert fake_quantize(x, torch.tensor(0.5)).tolist() == [224.0, -224.0, 224.0, -224.0]


def test_not_a_number_stays_visible() -> None:
    assert fake_quantize(torch.tensor([math.nan]), torch.tensor(1.0)).isnan().all()


def test_quantizing_twice_changes_nothing() -> None:
    scale = scale_from_amax(torch.tensor(100.0))
    once = fake_quantize(interesting_values(), scale)
    assert torch.equal(fake_quantize(once, scale), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_goes_straight_through(dtype: torch.dtype) -> None:
    x = (300 * torch.randn(4, 5, generator=torch.Generator().manual_seed(2))).to(dtype).requires_grad_()
    scale = torch.tensor(0.5, requires_grad=True)
    upstream = torch.randn(4, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    (fake_quantize(x, scale) * upstream).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)  # of clipped values too
    assert scale.grad is None


def test_operator_keeps_its_contract() -> None:
    """Shapes and types of the fake implementation, no aliasing, autograd registration: what `torch.export` relies on."""
    x = torch.randn(3, 4).t().requires_grad_()
    torch.library.opcheck(fake_quantize, (x, torch.tensor(0.1)))


def amaxes() -> Tensor:
    """Magnitudes whose scale is exactly a float16 number, one float32 step to either side of these, and random ones."""
    generator = torch.Generator().manual_seed(4)
    halves = (2.0 ** torch.randint(-13, 12, (3000,), generator=generator) * (1 + torch.rand(3000))).half().float()
    exact = halves * E4M3_MAX
    up, down = (torch.nextafter(exact, torch.tensor(end)) for end in (math.inf, 0.0))
    draws = 10 ** (8 * torch.rand(3000, generator=generator) - 4)
    return torch.cat([exact, up, down, draws])


def test_scale_is_the_smallest_float16_that_clips_nothing() -> None:
    amax = amaxes()
    scale = scale_from_amax(amax)
    assert scale.dtype == torch.float32
    assert torch.equal(scale.half().float(), scale)
    assert (amax.double() <= scale.double() * E4M3_MAX).all()
    below = torch.nextafter(scale.half(), torch.tensor(0.0, dtype=torch.half)).double()
    smallest = scale == 2**-14
    assert (amax.double() > below * E4M3_MAX)[~smallest].all()
    assert 0 < smallest.sum() < len(amax) // 2


def test_amax_itself_is_never_clipped() -> None:
    """amax / scale is at most 448, so nothing observed is out of range."""
    amax = amaxes()
    assert (amax / scale_from_amax(amax) <= E4M3_MAX).all()


def test_scale_of_nothing_is_the_smallest_normal_float16() -> None:
    assert scale_from_amax(torch.tensor(0.0)).item() == 2**-14
    assert scale_from_amax(torch.tensor(1.0, dtype=torch.bfloat16)).item() >= 1 / 448
