"""Divergences against definitions written out here, in value and gradient."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from models.losses import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    top_k_kl,
    total_variation,
)
from tests.helpers.loss_references import dense, merged_kl, single

N, V = 7, 13
BETAS = [0.01, 0.1, 0.5, 0.9, 0.99]
CASES: list[tuple[str, float]] = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.0), ("jsd", 1.0)]
CASES += [("jsd", beta) for beta in BETAS]


def divergence(name: str, student: Tensor, teacher: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    if name == "jsd":
        return generalized_jsd(student, teacher, beta=beta, temperature=temperature)
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[name](student, teacher, temperature=temperature)


def logits(dtype: torch.dtype = torch.float32, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (spread * torch.randn(2, N, V, generator=generator)).to(dtype)
    return student.requires_grad_(), teacher.requires_grad_()


def looped(name: str, student: Tensor, teacher: Tensor, beta: float, temperature: float) -> list[float]:
    """The formulas of the module's table, one number at a time, in double precision."""

    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp(x / temperature) for x in row]
        return [power / sum(powers) for power in powers]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    losses = []
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax(student_row), softmax(teacher_row)
        if name == "forward_kl" or (name == "jsd" and beta == 0):
            losses.append(kl(p, q))
        elif name == "reverse_kl" or (name == "jsd" and beta == 1):
            losses.append(kl(q, p))
        else:
            m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
            losses.append(beta * kl(p, m) + (1 - beta) * kl(q, m))
    return losses


def differentiable(name: str, student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """The same through `torch.distributions` in double precision, for gradients."""
    q = Categorical(logits=student.double() / temperature)
    p = Categorical(logits=teacher.double() / temperature)
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return kl_divergence(p, q)
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return kl_divergence(q, p)
    m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)


def close_to(gradient: Tensor, expected: Tensor, *, rtol: float) -> None:
    """Elements that are differences of larger numbers are as exact as these: 1e-5 of the largest element."""
    torch.testing.assert_close(gradient.double(), expected.double(), rtol=rtol, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize(("name", "beta"), CASES)
def test_value_and_gradient_in_float32(name: str, beta: float, temperature: float) -> None:
    student, teacher = logits()
    weights = torch.arange(1.0, N + 1)  # an upstream gradient that differs from token to token
    ours = divergence(name, student, teacher, beta=beta, temperature=temperature)
    expected = looped(name, student, teacher, beta, temperature)
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.double), rtol=2e-6, atol=2e-7)

    (gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    reference = (differentiable(name, student, teacher.detach(), beta, temperature) * weights).sum()
    (expected_gradient,) = torch.autograd.grad(reference, student)
    close_to(gradient, expected_gradient, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.5])
@pytest.mark.parametrize(("name", "beta"), CASES)
def test_bfloat16_costs_the_rounding_of_the_gradient_only(name: str, beta: float, temperature: float) -> None:
    """Values are as exact as in float32; gradients are off by at most half a bfloat16 step (2**-8 relative)."""
    student, teacher = logits(torch.bfloat16)
    ours = divergence(name, student, teacher, beta=beta, temperature=temperature)
    assert ours.dtype == torch.float32
    expected = looped(name, student, teacher, beta, temperature)
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.double), rtol=2e-6, atol=2e-7)

    exact = student.detach().double().requires_grad_()
    reference = differentiable(name, exact, teacher.detach(), beta, temperature)
    (expected_gradient,) = torch.autograd.grad(reference.sum(), exact)
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    close_to(gradient, expected_gradient, rtol=2**-8 + 1e-5)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_teacher_gets_no_gradient(name: str, beta: float) -> None:
    student, teacher = logits()
    divergence(name, student, teacher, beta=beta).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_ends_of_jsd_are_the_kls(temperature: float) -> None:
    student, teacher = logits()
    end = generalized_jsd(student, teacher, beta=0, temperature=temperature)
    assert torch.equal(end, forward_kl(student, teacher, temperature=temperature))
    end = generalized_jsd(student, teacher, beta=1, temperature=temperature)
    assert torch.equal(end, reverse_kl(student, teacher, temperature=temperature))


def test_the_kls_are_the_limits_of_the_scaled_jsd() -> None:
    student, teacher = (x.detach().double() for x in logits(spread=1.0))
    beta = 1e-3
    near_zero = generalized_jsd(student, teacher, beta=beta) / beta
    near_one = generalized_jsd(student, teacher, beta=1 - beta) / beta
    torch.testing.assert_close(near_zero, forward_kl(student, teacher), rtol=0.02, atol=1e-3)
    torch.testing.assert_close(near_one, reverse_kl(student, teacher), rtol=0.02, atol=1e-3)


def test_directions() -> None:
    """A student that covers half of what the teacher does is punished by the forward KL, hardly by the reverse."""
    teacher = torch.tensor([[0.0, 0.0, -30.0]])
    narrow, broad = torch.tensor([[0.0, -10.0, -30.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    torch.testing.assert_close(reverse_kl(narrow, teacher), torch.tensor([math.log(2)]), rtol=0, atol=1e-3)
    assert forward_kl(narrow, teacher).item() == pytest.approx(5 - math.log(2), abs=1e-3)
    torch.testing.assert_close(forward_kl(broad, teacher), torch.tensor([math.log(1.5)]), rtol=0, atol=1e-3)
    assert reverse_kl(broad, teacher) > 5


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_not_negative_and_zero_for_equal_distributions(name: str, beta: float) -> None:
    student, teacher = logits()
    assert (divergence(name, student, teacher, beta=beta) > 1e-3).all()
    shifted = student.detach() + torch.arange(N)[:, None]  # the same distribution: softmax knows no offset
    torch.testing.assert_close(divergence(name, student, shifted, beta=beta), torch.zeros(N), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_extreme_logits_stay_finite(name: str, beta: float) -> None:
    student = torch.tensor([[0.0, -1e4, 1e4], [5.0, 5.0, 5.0]], requires_grad=True)
    loss = divergence(name, student, torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 0.0]]), beta=beta)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_jsd_is_bounded_by_the_entropy_of_its_mixture() -> None:
    student, teacher = torch.tensor([[0.0, -1e3]]), torch.tensor([[-1e3, 0.0]])
    for beta in BETAS:
        bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert generalized_jsd(student, teacher, beta=beta).item() == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_outside_its_range(beta: float) -> None:
    with pytest.raises(ValueError, match=f"expected beta between 0 and 1, found {beta}"):
        generalized_jsd(*logits(), beta=beta)


# The further members ------------------------------------------------------------------------------------------------

FURTHER = {
    "joined ends": (partial(generalized_jsd, beta=0.2, join_ends=True), single("jsd", beta=0.2, join_ends=True)),
    "skew forward": (partial(skew_forward_kl, skew=0.3), single("skew_forward_kl", skew=0.3)),
    "skew reverse": (partial(skew_reverse_kl, skew=0.3), single("skew_reverse_kl", skew=0.3)),
    "total variation": (total_variation, single("total_variation")),
    "top k": (partial(top_k_kl, top_k=4), single("top_k_kl", top_k=4)),
}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", FURTHER)
def test_further_members_against_their_formulas(name: str, temperature: float) -> None:
    function, objective = FURTHER[name]
    student, teacher = logits()
    q, p = (torch.softmax(x.double() / temperature, -1) for x in (student, teacher.detach()))
    kind = next(iter(objective.weights))
    expected = merged_kl(q, *p.topk(4, -1)) if kind == "top_k_kl" else dense(kind, q, p, objective)
    found = function(student, teacher, temperature=temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    found_gradient, expected_gradient = (torch.autograd.grad(loss.sum(), student)[0] for loss in (found, expected))
    close_to(found_gradient, expected_gradient, rtol=1e-5)


def test_joined_ends_are_continuous() -> None:
    """The plain family falls to 0 towards its ends, and jumps there."""
    student, teacher = logits(spread=1.0)
    for beta, near in ((0.0, 1e-4), (1.0, 1 - 1e-4)):
        joined = [generalized_jsd(student, teacher, beta=b, join_ends=True) for b in (beta, near)]
        torch.testing.assert_close(joined[0], joined[1], rtol=1e-2, atol=1e-3)
        assert (generalized_jsd(student, teacher, beta=near) < 1e-3).all()


def test_relations_between_members() -> None:
    student, teacher = logits()
    torch.testing.assert_close(skew_forward_kl(student, teacher, skew=0.0), forward_kl(student, teacher))
    torch.testing.assert_close(skew_reverse_kl(student, teacher, skew=0.0), reverse_kl(student, teacher))
    torch.testing.assert_close(top_k_kl(student, teacher, top_k=V), forward_kl(student, teacher))
    merged = [top_k_kl(student, teacher, top_k=k) for k in range(1, V)]
    for coarse, fine in zip(merged, [*merged[1:], forward_kl(student, teacher)], strict=True):
        assert (coarse <= fine + 1e-6).all()  # merging tokens loses information, never adds
    pinsker = (forward_kl(student, teacher) / 2).sqrt()
    assert (total_variation(student, teacher) <= pinsker.clamp(max=1) + 1e-6).all()


def test_skew_and_top_k_outside_their_range() -> None:
    for skew in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"expected a skew of at least 0 and below 1, found {skew}"):
            skew_forward_kl(*logits(), skew=skew)
    with pytest.raises(ValueError, match="expected a top_k of at most the vocabulary's 13 tokens, found 14"):
        top_k_kl(*logits(), top_k=14)
