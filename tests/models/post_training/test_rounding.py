"""Rounding methods against their definitions, written as loops over single numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.post_training.rounding import Rounded, gptq, nearest, quantease
from models.quantization.fake_quantize import fake_quantize
from models.quantization.formats import FORMATS, Grid
from models.quantization.scales import scale_from_amax, weight_scales

GRIDS = {
    "fp8": Grid("fp8_e4m3"),
    "fp8 rows": Grid("fp8_e4m3", "row"),
    "int8 rows": Grid("int8", "row"),
    "int8 groups": Grid("int8", "group", 8),
    "int4 groups": Grid("int4", "group", 8),
    "int4 groups with zero points": Grid("int4", "group", 8, zero_point=True),
}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
DAMPING = 0.01


def output_error(weight_OI: Tensor, values_OI: Tensor, gram_II: Tensor) -> float:
    """tr((V - W) H (V - W)^T): the squared change of the outputs, summed over tokens and outputs."""
    difference_OI = (values_OI - weight_OI).double()
    return float((difference_OI @ gram_II.double() * difference_OI).sum())


def problem(outputs: int = 6, inputs: int = 24, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of inputs that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.linspace(2, 0.2, inputs)
    x_SI = torch.randn(200, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), x_SI.T @ x_SI


def damp(gram_II: Tensor) -> Tensor:
    """H plus a hundredth of its mean diagonal."""
    return gram_II.double() + DAMPING * gram_II.diagonal().double().mean() * torch.eye(
        len(gram_II), dtype=torch.float64
    )


def round_again(rounded: Rounded, grid: Grid) -> Tensor:
    return fake_quantize(rounded.weight_OI, rounded.scale, rounded.zero_point, grid.numbers, 0, grid.group_size)


def scale_at(rounded_scale: Tensor | None, row: int, column: int, grid: Grid) -> Tensor | None:
    """The scale, or zero point, of one number."""
    if rounded_scale is None or grid.scales == "tensor":
        return rounded_scale
    return rounded_scale[row] if grid.scales == "row" else rounded_scale[row, column // grid.group_size]


def obq(weight_OI: Tensor, gram_II: Tensor, grid: Grid) -> Tensor:
    """GPTQ by its definition: round an input, correct those that follow, strike it from the inverse Hessian."""
    values_OI = weight_OI.double().clone()
    inverse_II = damp(gram_II).inverse()
    scale, zero_point = weight_scales(weight_OI, grid, "max")
    for k in range(values_OI.shape[1]):
        if grid.scales == "group" and k % grid.group_size == 0:
            group = k // grid.group_size
            fresh = weight_scales(values_OI[:, k : k + grid.group_size].float(), grid, "max")
            scale[:, group] = fresh[0][:, 0]
            if zero_point is not None:
                zero_point[:, group] = fresh[1][:, 0]
        for row in range(values_OI.shape[0]):
            wanted = values_OI[row, k].clone()
            at = scale_at(scale, row, k, grid), scale_at(zero_point, row, k, grid)
            values_OI[row, k] = fake_quantize(
                wanted.float().reshape(1), at[0].reshape(1), None if at[1] is None else at[1].reshape(1), grid.numbers
            )[0]
            correction_I = (wanted - values_OI[row, k]) / inverse_II[k, k] * inverse_II[k]
            values_OI[row, k + 1 :] -= correction_I[k + 1 :]
        inverse_II = inverse_II - inverse_II[:, k : k + 1] @ inverse_II[k : k + 1] / inverse_II[k, k]
    return values_OI.float()


@grids
def test_gptq_is_what_its_definition_gives(grid: Grid) -> None:
    weight_OI, gram_II = problem()
    assert torch.equal(
        gptq(weight_OI, gram_II, grid, search="max", damping=DAMPING).weight_OI, obq(weight_OI, gram_II, grid)
    )


@pytest.mark.parametrize("grid", [GRIDS["fp8"], GRIDS["int8 rows"]], ids=["fp8", "int8 rows"])
def test_ordered_gptq_is_gptq_with_the_inputs_in_another_order(grid: Grid) -> None:
    weight_OI, gram_II = problem()
    order_I = gram_II.diagonal().argsort(descending=True)
    ordered = gptq(weight_OI, gram_II, grid, ordered=True)
    shuffled = gptq(weight_OI[:, order_I], gram_II[order_I][:, order_I], grid)
    assert torch.equal(ordered.weight_OI[:, order_I], shuffled.weight_OI)
    assert not torch.equal(ordered.weight_OI, gptq(weight_OI, gram_II, grid).weight_OI)


@grids
@pytest.mark.parametrize("seed", range(3))
def test_gptq_beats_rounding_to_nearest(grid: Grid, seed: int) -> None:
    weight_OI, gram_II = problem(seed=seed)
    naive = output_error(weight_OI, nearest(weight_OI, grid).weight_OI, damp(gram_II))
    for ordered in (False, True):
        found = gptq(weight_OI, gram_II, grid, damping=DAMPING, ordered=ordered)
        assert output_error(weight_OI, found.weight_OI, damp(gram_II)) < naive


def one_sweep(weight_OI: Tensor, gram_II: Tensor, grid: Grid, start: Rounded) -> Tensor:
    """QuantEase by its definition: each number takes the best value of the grid while all others stay."""
    hessian_II, values_OI = damp(gram_II), start.weight_OI.double().clone()
    for k in range(values_OI.shape[1]):
        for row in range(values_OI.shape[0]):
            others_I = (values_OI[row] - weight_OI[row].double()) @ hessian_II
            best = values_OI[row, k] - others_I[k] / hessian_II[k, k]
            at = scale_at(start.scale, row, k, grid), scale_at(start.zero_point, row, k, grid)
            values_OI[row, k] = fake_quantize(
                best.float().reshape(1), at[0].reshape(1), None if at[1] is None else at[1].reshape(1), grid.numbers
            )[0]
    return values_OI.float()


@grids
def test_quantease_is_what_its_definition_gives(grid: Grid) -> None:
    weight_OI, gram_II = problem()
    start = nearest(weight_OI, grid)
    found = quantease(weight_OI, gram_II, grid, start, damping=DAMPING, sweeps=1, rescale=False)
    assert torch.equal(found.weight_OI, one_sweep(weight_OI, gram_II, grid, start))
    assert not torch.equal(found.weight_OI, start.weight_OI)
    assert torch.equal(found.scale, start.scale)


@grids
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_quantease_never_raises_its_objective(grid: Grid, rescale: bool, method: str) -> None:
    weight_OI, gram_II = problem(seed=3)
    found = nearest(weight_OI, grid) if method == "nearest" else gptq(weight_OI, gram_II, grid, damping=DAMPING)
    errors = [output_error(weight_OI, found.weight_OI, damp(gram_II))]
    for _ in range(5):
        found = quantease(weight_OI, gram_II, grid, found, damping=DAMPING, sweeps=1, rescale=rescale)
        errors.append(output_error(weight_OI, found.weight_OI, damp(gram_II)))
    assert all(after <= before * (1 + 1e-6) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < errors[0] or (
        method == "gptq" and not rescale
    )  # of so few inputs GPTQ may find the best values


def test_scales_are_given_their_best_values() -> None:
    """Where codes stay as they are, no other scale does better."""
    weight_OI, gram_II = problem(1, 8)
    grid = Grid("int8", "group", 8)
    start = nearest(weight_OI, grid)
    crooked = Rounded(1.05 * start.weight_OI, 1.05 * start.scale, None)
    found = quantease(weight_OI, gram_II, grid, crooked, damping=DAMPING, sweeps=1)
    error = output_error(weight_OI, found.weight_OI, damp(gram_II))
    for factor in (0.9, 0.99, 0.999, 1.001, 1.01, 1.1):
        assert error < output_error(weight_OI, factor * found.weight_OI, damp(gram_II))
    assert not torch.equal(found.scale, crooked.scale)


@grids
def test_rounding_again_changes_no_bit(grid: Grid) -> None:
    weight_OI, gram_II = problem(seed=1)
    for search in ("max", "mse"):
        plain = nearest(weight_OI, grid, search=search)
        for found in (
            plain,
            gptq(weight_OI, gram_II, grid, search=search),
            gptq(weight_OI, gram_II, grid, search=search, ordered=True),
            quantease(weight_OI, gram_II, grid, plain),
        ):
            assert torch.equal(round_again(found, grid), found.weight_OI)
            shape, zero_point = weight_scales(weight_OI, grid)[0].shape, found.zero_point
            assert found.scale.shape == shape
            assert (zero_point is not None) == grid.zero_point
            assert zero_point is None or zero_point.dtype == torch.int8


def test_more_inputs_than_a_block() -> None:
    weight_OI, gram_II = problem(3, 300)
    grid = FORMATS["int8"].weight
    assert torch.equal(gptq(weight_OI, gram_II, grid, search="max").weight_OI, obq(weight_OI, gram_II, grid))
    start = nearest(weight_OI, grid)
    swept = quantease(weight_OI, gram_II, grid, start, damping=DAMPING, sweeps=1, rescale=False)
    assert torch.equal(swept.weight_OI, one_sweep(weight_OI, gram_II, grid, start))


@grids
def test_inputs_that_are_always_zero_are_rounded_to_nearest(grid: Grid) -> None:
    weight_OI, gram_II = problem()
    dead = torch.tensor([0, 7, 23])
    gram_II[dead], gram_II[:, dead] = 0, 0
    for ordered in (False, True):
        found = gptq(weight_OI, gram_II, grid, ordered=ordered)
        with_dead = replace(
            found, weight_OI=torch.where(torch.isin(torch.arange(24), dead), weight_OI, found.weight_OI)
        )
        assert torch.equal(round_again(with_dead, grid), found.weight_OI)


def test_without_damping_dependent_inputs_are_refused() -> None:
    weight_OI, _ = problem()
    x_SI = torch.randn(4, 24)
    with pytest.raises(ValueError, match="raise the damping"):
        gptq(weight_OI, x_SI.T @ x_SI, GRIDS["fp8"], damping=0.0)


@pytest.mark.parametrize("grid", [GRIDS["int4 groups"], GRIDS["int4 groups with zero points"]])
def test_scales_of_groups_are_searched_where_errors_count(grid: Grid) -> None:
    """An error counts by what is left of an input's variance once those rounded after it are known: 1 / (H_>=k,>=k)^-1 at k."""
    weight_OI, gram_II = problem()
    order_I = gram_II.diagonal().argsort(descending=True)
    hessian_II = damp(gram_II)[order_I][:, order_I]
    left_I = torch.stack([1 / hessian_II[k:, k:].inverse()[0, 0] for k in range(len(order_I))])
    importance_I = left_I[order_I.argsort()].float()
    found = gptq(weight_OI, gram_II, grid, search="mse", damping=DAMPING, ordered=True)
    scale, zero_point = weight_scales(weight_OI, grid, "mse", importance_I)
    assert torch.equal(found.scale, scale) and not torch.equal(scale, weight_scales(weight_OI, grid, "mse")[0])
    assert zero_point is None or torch.equal(found.zero_point, zero_point)


def test_an_importance_is_a_weight_of_squared_errors() -> None:
    grid, (weight_OI, _) = GRIDS["int4 groups"], problem()
    importance_I = torch.linspace(0, 3, 24).square()
    scale_OG, _ = weight_scales(weight_OI, grid, "mse", importance_I)
    for row, group in torch.cartesian_prod(torch.arange(6), torch.arange(3)).tolist():
        inputs = slice(8 * group, 8 * group + 8)
        values, counts = weight_OI[row, inputs], importance_I[inputs]
        trials = [scale_from_amax(share * values.abs().amax(), 7) for share in torch.linspace(1, 0.4, 13).tolist()]
        errors = [
            (counts * ((values / trial).round().clamp(-8, 7) * trial - values).square()).sum() for trial in trials
        ]
        assert scale_OG[row, group] == trials[int(torch.stack(errors).argmin())]


@pytest.mark.parametrize("zero_point", [False, True])
def test_importance_lowers_the_error_of_the_outputs(zero_point: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where inputs of a group differ in size, as those of a decoder do."""
    grid = Grid("int4", "group", 32, zero_point=zero_point)
    sizes_I = torch.logspace(0, 2, 32).repeat(2)
    problems = [(w, h * sizes_I * sizes_I[:, None]) for w, h in (problem(64, 64, seed=seed) for seed in range(4))]
    weighed = [output_error(w, gptq(w, h, grid, ordered=True).weight_OI, h) for w, h in problems]
    monkeypatch.setattr("models.post_training.rounding.weight_scales", lambda w, g, s, _=None: weight_scales(w, g, s))
    plain = [output_error(w, gptq(w, h, grid, ordered=True).weight_OI, h) for w, h in problems]
    assert all(one < 0.95 * other for one, other in zip(weighed, plain, strict=True))
