"""Gradients of learned scales against LSQ written in plain torch, and quantizers whose scales are learned."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from models.quantization import (
    FORMATS,
    FakeQuantizedLinear,
    Grid,
    InputQuantizer,
    RowQuantizer,
    WeightQuantizer,
    codes_of,
    fake_quantize,
    freeze_scales,
)
from models.quantization.formats import RANGES
from models.quantization.learned_scales import (
    SCALE_RATE,
    add_scale_group,
    cover_new_groups,
    learn_scales,
    learned_scales,
    round_learned_scales,
)
from models.quantization.lsq import fake_quantize_learned, log_of, scale_of


def naive(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, numbers: str, factor: float, follows: bool = False
) -> Tensor:
    """Equation 1 of LSQ with its gradients by autograd: the rounding alone passes gradients straight through.

    `scale` and `zero_point` have the shape of x, or one that broadcasts; codes are counted from the zero point.  What follows its
    scale is the scale times a number of its own.
    """
    low, high = RANGES[numbers]
    zero = 0 if zero_point is None else zero_point
    scale = scale.detach() + factor * (scale - scale.detach())  # the paper's gradient scale
    clipped = (x / (scale.detach() if follows else scale)).clamp(
        torch.as_tensor(low - zero), torch.as_tensor(high - zero)
    )
    rounded = clipped.to(torch.float8_e4m3fn).float() if numbers == "fp8_e4m3" else clipped.round()
    return (clipped + (rounded - clipped).detach()) * scale


def spread(values: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A number for each of x's values."""
    if block_size:
        return values.repeat_interleave(block_size, -1)[..., : x.shape[-1]]
    return values.view([-1 if dim == axis else 1 for dim in range(x.dim())]) if values.dim() else values


CASES = {
    "int8 tensor": ("int8", (), 0, 0, False),
    "int8 row": ("int8", (6,), 0, 0, False),
    "int8 group": ("int8", (6, 4), 0, 8, False),
    "int8 group, zero points": ("int8", (6, 4), 0, 8, True),
    "int4 tensor": ("int4", (), 0, 0, False),
    "int4 row": ("int4", (6,), 0, 0, False),
    "int4 column": ("int4", (30,), 1, 0, False),
    "int4 row, zero points": ("int4", (6,), 0, 0, True),
    "int4 group, the last one shorter": ("int4", (6, 4), 0, 8, False),
    "int4 group, zero points": ("int4", (6, 4), 0, 8, True),
    "fp8 tensor": ("fp8_e4m3", (), 0, 0, False),
    "fp8 row": ("fp8_e4m3", (6,), 0, 0, False),
}


@pytest.mark.parametrize("follows", [False, True], ids=["stays", "follows"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_those_of_the_definition(
    case: tuple[str, tuple[int, ...], int, int, bool], follows: bool
) -> None:
    numbers, shape, axis, block_size, with_zero_points = case
    low, high = RANGES[numbers]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 30, generator=generator)
    scale = scale_of(torch.log((0.3 + torch.rand(shape, generator=generator)) / high))
    zero_point = torch.randint(-5, 6, shape, generator=generator, dtype=torch.int8) if with_zero_points else None
    with torch.no_grad():  # values at the very ends of the range belong to it
        ends = spread(scale, x, axis, block_size).expand_as(x)[:, :2]
        zeros = 0 if zero_point is None else spread(zero_point, x, axis, block_size).expand_as(x)[:, :2]
        x[:, :2] = ends * (torch.tensor([low, high]) - zeros)
    upstream = torch.randn(6, 30, generator=generator)

    ours_x, log_scale = x.clone().requires_grad_(), log_of(scale).requires_grad_()
    ours = fake_quantize_learned(ours_x, scale, log_scale, 0.37, zero_point, numbers, axis, block_size, follows)
    assert torch.equal(ours, fake_quantize(x, scale, zero_point, numbers, axis, block_size))
    (ours * upstream).sum().backward()

    naive_x, naive_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    zeros_like_x = None if zero_point is None else spread(zero_point.float(), x, axis, block_size)
    theirs = naive(naive_x, spread(naive_scale, x, axis, block_size), zeros_like_x, numbers, 0.37, follows)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (theirs * upstream).sum().backward()
    torch.testing.assert_close(log_scale.grad, naive_scale.grad, rtol=1e-4, atol=1e-4)
    # The definition divides by the scale and multiplies again: a gradient of 1 up to a rounding.
    torch.testing.assert_close(ours_x.grad, naive_x.grad, rtol=1e-5, atol=1e-6)
    clipped = (ours_x.grad == 0).float().mean()
    assert 0.01 < clipped < 0.9, clipped
    assert (ours_x.grad[:, :2] == upstream[:, :2]).all()


@pytest.mark.parametrize("numbers", RANGES)
def test_the_gradient_of_a_half_precision_input_is_summed_in_float32(numbers: str) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    log_scale = log_of(torch.tensor(2.0 / RANGES[numbers][1])).requires_grad_()
    scale = scale_of(log_scale.detach())
    ours = fake_quantize_learned(x, scale, log_scale, 1.0, None, numbers)
    assert ours.dtype == torch.bfloat16
    ours.sum().backward()
    assert (x.grad.dtype, log_scale.grad.dtype) == (torch.bfloat16, torch.float32)
    v = x.detach().float() / scale
    inside = (v >= RANGES[numbers][0]) & (v <= RANGES[numbers][1])
    codes = codes_of(x.detach(), scale, None, numbers).float()
    torch.testing.assert_close(log_scale.grad, torch.where(inside, codes - v, codes).sum())


def test_the_operator_keeps_torch_s_rules() -> None:
    arguments = (torch.randn(4, 10), torch.full((4, 3), 0.25), torch.full((4, 3), 0.25).log().requires_grad_(), 0.5)
    torch.library.opcheck(fake_quantize_learned, (*arguments, None, "int4", 0, 4, True))


def test_logarithms_hold_the_scale() -> None:
    """All normal float16 numbers come back; what lies between them goes to the nearest, what lies beyond to the ends."""
    halves = torch.arange(0x0400, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    assert torch.equal(scale_of(log_of(halves)), halves)
    assert scale_of(torch.tensor([-100.0, 100.0])).tolist() == [2.0**-14, 65504]
    assert scale_of(torch.tensor(math.log(1 + 0.4 * 2**-10))) == 1
    assert torch.isfinite(log_of(torch.zeros(2))).all()


def learning_layer(format: str, seed: int = 0, bias: bool = True, weights_follow: bool = False) -> FakeQuantizedLinear:
    torch.manual_seed(seed)
    layer = FakeQuantizedLinear(nn.Linear(64, 8, bias=bias), format)
    layer(torch.randn(20, 64))
    freeze_scales(layer)
    learn_scales(layer, weights_follow=weights_follow)
    return layer


@pytest.mark.parametrize("format", FORMATS)
def test_weights_and_calibrated_inputs_are_learned(format: str) -> None:
    layer = learning_layer(format)
    weight, input = layer.weight_quantizer, layer.input_quantizer
    learned = [weight.log_scale] if not isinstance(input, InputQuantizer) else [input.log_scale, weight.log_scale]
    assert [id(p) for p in learned_scales(layer)] == [id(p) for p in learned]
    assert weight.log_scale.shape == weight.scale.shape
    frozen = copy.deepcopy(layer)
    for quantizer in frozen.quantizers():
        quantizer.log_scale = None
    x = 2 * torch.randn(20, 64)
    ours = layer(x)
    assert torch.equal(ours, frozen(x))
    ours.square().sum().backward()
    assert all((p.grad != 0).any() and torch.isfinite(p.grad).all() for p in learned)
    assert all(p.grad.dtype == torch.float32 for p in learned)


SHARING = {"tensor": 8 * 64, "row": 64, "group": 32}


@pytest.mark.parametrize("format", ["fp8_e4m3", "int8", "int4_g32", "int4_g32_zp"])
def test_gradients_of_weights_are_scaled_by_who_shares(format: str) -> None:
    quantizer = learning_layer(format).weight_quantizer
    weight, grid = torch.randn(8, 64, requires_grad=True), quantizer.grid
    quantizer(weight).sum().backward()
    plain = quantizer.scale.clone().log().requires_grad_()
    layout = (quantizer.zero_point, grid.numbers, 0, grid.group_size)
    fake_quantize_learned(weight, quantizer.scale, plain, 1.0, *layout).sum().backward()
    torch.testing.assert_close(quantizer.log_scale.grad, plain.grad / (SHARING[grid.scales] * grid.high) ** 0.5)


def test_the_gradient_of_an_input_does_not_depend_on_micro_batches() -> None:
    quantizer = learning_layer("int8_static").input_quantizer
    x = torch.randn(12, 64)
    quantizer(x).sum().backward()
    whole, quantizer.log_scale.grad = quantizer.log_scale.grad, None
    for part in x.split([1, 8, 3]):
        quantizer(part).sum().backward()
    torch.testing.assert_close(quantizer.log_scale.grad, whole)
    scale = quantizer.scale
    v = x / scale
    slope = torch.where(v.abs() <= 127, v.round() - v, codes_of(x, scale, None, "int8").float())
    torch.testing.assert_close(whole, slope.sum() / (64 * 127) ** 0.5)


@pytest.mark.parametrize("format", FORMATS)
def test_frozen_scales_keep_straight_gradients(format: str) -> None:
    """Without learning nothing has changed: clipped values pass gradients, and there is no parameter."""
    torch.manual_seed(0)
    layer = FakeQuantizedLinear(nn.Linear(64, 8), format)
    layer(torch.randn(20, 64))
    freeze_scales(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    weight, upstream = (5 * layer.weight.detach()).requires_grad_(), torch.randn(8, 64)
    (layer.weight_quantizer(weight) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_floating_types_leave_logarithms_alone(dtype: torch.dtype) -> None:
    layer = learning_layer("fp8_e4m3")
    before = [p.detach().clone() for p in learned_scales(layer)]
    held = learned_scales(layer)
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert all(p is q for p, q in zip(learned_scales(layer), held, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(learned_scales(layer), before, strict=True))


def test_scales_that_are_set_are_where_learning_goes_on() -> None:
    quantizer = learning_layer("int4_g32").weight_quantizer
    scale = quantizer.scale / 2
    quantizer.set_scales(scale)
    assert torch.equal(scale_of(quantizer.log_scale.detach()), scale)


def test_there_has_to_be_something_to_learn() -> None:
    with pytest.raises(ValueError, match="not learned yet, found 0 scales of weights and inputs; learn scales once"):
        learn_scales(nn.Linear(3, 3), weights_follow=False)
    with pytest.raises(ValueError, match="found 2 scales of weights and inputs, which are learned already; learn"):
        learn_scales(learning_layer("fp8_e4m3"), weights_follow=False)
    assert not RowQuantizer(Grid("int8", "row")).has_own_scales
    assert WeightQuantizer(Grid("int8", "row"), torch.randn(2, 2)).has_own_scales


def test_the_optimizer_gets_a_group_without_decay_that_its_schedule_covers() -> None:
    layer = learning_layer("fp8_e4m3")
    optimizer = torch.optim.AdamW([layer.weight, layer.bias], lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(3):
        optimizer.step()
        schedule.step()
    add_scale_group(optimizer, learned_scales(layer))
    cover_new_groups(schedule)
    main, scales = optimizer.param_groups
    assert scales["params"] == learned_scales(layer)
    assert (scales["weight_decay"], scales["lr"], scales["betas"]) == (0, SCALE_RATE * 0.1 / 4, (0.8, 0.9))
    cover_new_groups(schedule)
    schedule.step()
    assert main["lr"] == pytest.approx(0.1 / 5)
    assert scales["lr"] == pytest.approx(SCALE_RATE * 0.1 / 5)
    assert schedule.get_last_lr() == [main["lr"], scales["lr"]]
    assert main["weight_decay"] == 0.5
    other = torch.optim.lr_scheduler.ExponentialLR(torch.optim.SGD([layer.weight], lr=1.0), 0.9)
    add_scale_group(other.optimizer, learned_scales(layer))
    with pytest.raises(ValueError, match="for learned scales, found ExponentialLR; set"):
        cover_new_groups(other)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_follow_keep_their_codes(format: str) -> None:
    """The scale alone decides then what the codes stand for; other weights keep their values and get other codes."""
    following, staying = (learning_layer(format, weights_follow=follows) for follows in (True, False))
    generator = torch.Generator().manual_seed(3)
    move = 0.2 * torch.randn(following.weight_quantizer.scale.shape, generator=generator)
    for layer in (following, staying):
        quantizer, weight = layer.weight_quantizer, layer.weight.detach().clone()
        codes = quantizer.codes(weight)
        with torch.no_grad():
            quantizer.log_scale.add_(move)
        round_learned_scales(layer)
        assert torch.equal(quantizer.scale, scale_of(quantizer.log_scale.detach()))
        same = (quantizer.codes(layer.weight) == codes).float().mean()
        if layer is following:
            # A weight may lie so near to the middle of two codes that rounding decides.
            assert same > 0.99
            ratios = spread(
                quantizer.scale / learning_layer(format).weight_quantizer.scale, weight, 0, quantizer.grid.group_size
            )
            torch.testing.assert_close(layer.weight.detach(), weight * ratios)
        else:
            assert same < 0.99
            assert torch.equal(layer.weight, weight)


def test_weights_on_the_grid_show_their_scales_only_by_following() -> None:
    """What a solver leaves: values equal to their rounding, of which LSQ's own gradient sees nothing."""
    gradients = {}
    for follows in (True, False):
        layer = learning_layer("int4_g32", weights_follow=follows)
        quantizer = layer.weight_quantizer
        with torch.no_grad():
            layer.weight.copy_(quantizer(layer.weight))
        layer(torch.randn(20, 64, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        gradients[follows] = quantizer.log_scale.grad.abs().mean()
    assert gradients[False] < 1e-5 * gradients[True]


def test_only_float32_weights_can_follow() -> None:
    layer = FakeQuantizedLinear(nn.Linear(64, 8), "int4_g32").bfloat16()
    freeze_scales(layer)
    with pytest.raises(
        ValueError, match="expected float32 weights to follow .* found torch.bfloat16, .*student_dtype to float32"
    ):
        learn_scales(layer, weights_follow=True)
    assert not learned_scales(layer)
    learn_scales(layer, weights_follow=False)


# The steps of FP8 grow with its values, so only scales that clip are bad ones.
BAD_START = {"fp8_e4m3": 0.25, "int8_static": 2, "int4_g32": 2, "int4_g32_zp": 2}


@pytest.mark.parametrize("format", BAD_START)
def test_learning_scales_reduces_the_error_that_frozen_ones_leave(format: str) -> None:
    """Scales start far from where they should be; weights stay, so scales alone can do better."""
    layer = learning_layer(format, bias=False)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = nn.functional.linear(x, layer.weight)
        for parameter in learned_scales(layer):
            parameter.add_(math.log(BAD_START[format]))
    round_learned_scales(layer)

    def error() -> Tensor:
        return (layer(x) - expected).square().mean()

    first = error().item()
    moving = torch.optim.AdamW(learned_scales(layer), lr=0.01)
    for _ in range(100):
        moving.zero_grad()
        error().backward()
        moving.step()
        round_learned_scales(layer)
        for quantizer in layer.quantizers():
            assert torch.equal(quantizer.scale.half().float(), quantizer.scale)
            assert torch.equal(quantizer.scale, scale_of(quantizer.log_scale.detach()))
    assert error().item() < 0.5 * first
