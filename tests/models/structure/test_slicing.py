"""Shrinking in place: the same Parameter, sliced optimizer state, and training that goes on."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from models.structure.slicing import group_indices, narrow_linear, narrow_parameter

KEEP = torch.tensor([0, 2, 5])


def step(linear: nn.Linear, optimizer: Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    linear(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("make", "moments"),
    [
        (lambda p: AdamW(p, lr=0.1), ["exp_avg", "exp_avg_sq"]),
        (lambda p: AdamW(p, lr=0.1, amsgrad=True), ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (lambda p: AdamW(p, lr=0.1, fused=True), ["exp_avg", "exp_avg_sq"]),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), ["momentum_buffer"]),
    ],
    ids=["adamw", "amsgrad", "fused", "momentum"],
)
def test_rows_and_moments_of_kept_units_are_bit_identical(
    make: Callable[..., Optimizer], moments: list[str], dim: int
) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 6), torch.randn(4, 6)
    optimizer = make(linear.parameters())
    for _ in range(3):
        step(linear, optimizer, x)
    weight, bias = linear.weight, linear.bias
    before = {name: optimizer.state[weight][name].clone() for name in moments}
    bias_before = {name: optimizer.state[bias][name].clone() for name in moments}
    data, bias_data = weight.detach().clone(), bias.detach().clone()
    steps = [float(s["step"]) for s in optimizer.state.values() if "step" in s]

    narrow_linear(linear, KEEP, dim, [optimizer])

    assert linear.weight is weight
    assert linear.bias is bias
    assert optimizer.param_groups[0]["params"][0] is weight
    assert torch.equal(weight, data.index_select(dim, KEEP))
    assert torch.equal(bias, bias_data[KEEP] if dim == 0 else bias_data)
    for name in moments:
        assert torch.equal(optimizer.state[weight][name], before[name].index_select(dim, KEEP))
        assert torch.equal(optimizer.state[bias][name], bias_before[name][KEEP] if dim == 0 else bias_before[name])
    assert [float(s["step"]) for s in optimizer.state.values() if "step" in s] == steps
    assert weight.grad is None
    assert (linear.out_features, linear.in_features) == tuple(weight.shape)
    assert weight.is_contiguous()

    step(linear, optimizer, x if dim == 0 else x[:, KEEP])  # and on it goes
    assert torch.isfinite(weight).all()


def test_kept_units_train_on_as_if_the_others_had_never_been() -> None:
    """Rows of a linear layer do not see each other: cut in the middle or at the start, the kept ones end bit for bit alike."""
    torch.manual_seed(0)
    x, target = torch.randn(8, 5), torch.randn(8, 6)

    def train(cut_before_step: int) -> torch.Tensor:
        torch.manual_seed(1)
        linear = nn.Linear(5, 6)
        optimizer = AdamW(linear.parameters(), lr=0.05)
        wanted = target
        for number in range(6):
            if number == cut_before_step:
                narrow_linear(linear, KEEP, 0, [optimizer])
                wanted = target[:, KEEP]
            optimizer.zero_grad()
            ((linear(x) - wanted) ** 2).sum().backward()
            optimizer.step()
        return linear.weight.detach()

    torch.testing.assert_close(train(3), train(0), rtol=1e-6, atol=1e-7)


def test_scalar_state_is_left_alone() -> None:
    """A parameter with one element has the shape of nothing else: step counters survive."""
    parameter = nn.Parameter(torch.arange(4.0))
    optimizer = AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    counter = optimizer.state[parameter]["step"]
    narrow_parameter(parameter, torch.tensor([1]), 0, [optimizer])
    assert optimizer.state[parameter]["step"] is counter
    narrow_parameter(parameter, torch.tensor([0]), 0, [optimizer])
    assert optimizer.state[parameter]["step"] is counter


def test_parameter_unknown_to_the_optimizer() -> None:
    parameter, other = nn.Parameter(torch.arange(4.0)), nn.Parameter(torch.ones(4))
    optimizer = AdamW([other])
    narrow_parameter(parameter, torch.tensor([1, 3]), 0, [optimizer])
    assert parameter.tolist() == [1.0, 3.0]
    assert parameter not in optimizer.state  # looking must not create an entry
    assert len(other) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_that_is_kept_from_before_does_not_spoil_the_next_gradient(dtype: torch.dtype) -> None:
    linear, kept = nn.Linear(4, 3, dtype=dtype), torch.tensor([0, 2])
    narrowed = linear.weight.detach()[kept]
    before = linear(torch.ones(1, 4, dtype=dtype)).sum()
    narrow_linear(linear, kept, 0)
    linear(torch.full((1, 4), 2.0, dtype=dtype)).sum().backward()
    assert before.grad_fn is not None
    assert linear.weight.dtype == dtype and torch.equal(linear.weight, narrowed)
    assert torch.equal(linear.weight.grad, torch.full((2, 4), 2.0, dtype=dtype))


def test_group_indices() -> None:
    assert group_indices(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
