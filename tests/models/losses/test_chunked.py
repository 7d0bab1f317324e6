"""The chunked loss against the whole one in double precision: values, gradients, memory, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.losses import (
    LOSSES,
    FullTargets,
    Head,
    Objective,
    TopKTargets,
    chunks,
    default_chunk_tokens,
    linear_objective,
)
from tests.helpers.loss_references import reference, single

N, V, D, E = 13, 37, 8, 6
MIX = {"forward_kl": 0.7, "jsd": 0.2, "cross_entropy": 0.1, "policy_gradient": 0.4, "top_k_kl": 0.3, "reverse_kl": 0.0}
OBJECTIVES = {name: single(name, top_k=5) for name in LOSSES} | {
    "jsd 0": single("jsd", beta=0.0),
    "jsd 1": single("jsd", beta=1.0),
    "jsd 0.01": single("jsd", beta=0.01),
    "jsd 0.9 joined": single("jsd", beta=0.9, join_ends=True),
    "skew 0": single("skew_forward_kl", skew=0.0),
    "skew reverse 0": single("skew_reverse_kl", skew=0.0),
    "skew 0.7": single("skew_reverse_kl", skew=0.7),
    "top 1": single("top_k_kl", top_k=1),
    "top all": single("top_k_kl", top_k=V),
    "weight": Objective({"reverse_kl": 2.5}),
    "mix": Objective(MIX, top_k=5),
    "mix at 2": Objective(MIX, top_k=5, temperature=2.0),
    "cross-entropy at 0.5": Objective({"cross_entropy": 1.0, "total_variation": 1.0}, temperature=0.5),
}
OBJECTIVES |= {f"{name} at 0.7": single(name, top_k=5, temperature=0.7) for name in LOSSES}


class Problem:
    """Random heads and hidden states, drawn from a seed alone."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, *, n: int = N, rows: int = V, teacher_rows: int = V, **head: Any
    ):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        bias = draw(rows).requires_grad_() if head.pop("bias", False) else None
        self.hidden = draw(n, D).requires_grad_()
        self.head = Head(draw(rows, D).requires_grad_(), bias, **head)
        self.teacher = FullTargets(draw(n, E), Head(draw(teacher_rows, E), draw(teacher_rows), soft_cap=4.0))
        self.labels = torch.randint(0, min(rows, teacher_rows), (n,), generator=generator)

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head.weight_VD, self.head.bias_V) if x is not None and x.requires_grad]

    def solve(self, objective: Objective, targets: Any = ..., **settings: Any) -> tuple[Tensor, dict, list[Tensor]]:
        targets = self.teacher if targets is ... else targets
        total, sums = linear_objective(self.hidden, self.head, targets, self.labels, objective, **settings)
        return total, sums, list(torch.autograd.grad(total, self.inputs))

    def value(self, objective: Objective) -> Tensor:
        return linear_objective(self.hidden, self.head, self.teacher, self.labels, objective)[0]

    def expected(self, objective: Objective, targets: Any = ..., **settings: Any) -> tuple[Tensor, dict, list[Tensor]]:
        targets = self.teacher if targets is ... else targets
        total, sums = reference(self.hidden, self.head, targets, self.labels, objective, **settings)
        return total, sums, list(torch.autograd.grad(total, self.inputs))


def close(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """Relative to the whole tensor: softmax gradients span many orders of magnitude."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= bound * float(expected.norm()) + 1e-12


def close_sum(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """Relative, or absolute for sums of about 1: log-ratios of both signs may cancel."""
    assert found.shape == expected.shape == ()
    assert found.item() == pytest.approx(expected.item(), rel=bound, abs=bound)


def agree(
    found: tuple[Tensor, dict, list[Tensor]], expected: tuple[Tensor, dict, list[Tensor]], bound: float = 1e-5
) -> None:
    close_sum(found[0], expected[0], bound)
    assert list(found[1]) == list(expected[1])
    for name in expected[1]:
        close_sum(found[1][name], expected[1][name], bound)
    assert len(found[2]) == len(expected[2]) > 0
    for gradient, reference_gradient in zip(found[2], expected[2], strict=True):
        close(gradient, reference_gradient, bound)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_in_value_and_gradient(name: str) -> None:
    problem = Problem(bias=True)
    agree(problem.solve(OBJECTIVES[name], chunk_tokens=5), problem.expected(OBJECTIVES[name]))


@pytest.mark.parametrize("name", [*LOSSES, "mix at 2"])
def test_double_precision_agrees_to_rounding(name: str) -> None:
    problem = Problem(torch.float64, bias=True, scale=0.3, soft_cap=2.0)
    agree(problem.solve(OBJECTIVES[name], chunk_tokens=4), problem.expected(OBJECTIVES[name]), 1e-11)


@pytest.mark.parametrize("chunk_tokens", [1, 3, N, 100, 0])
@pytest.mark.parametrize("name", ["forward_kl", "mix at 2"])
def test_chunks_make_no_difference(name: str, chunk_tokens: int) -> None:
    problem = Problem()
    agree(problem.solve(OBJECTIVES[name], chunk_tokens=chunk_tokens), problem.expected(OBJECTIVES[name]))


@pytest.mark.parametrize(
    "head", [{}, {"bias": True}, {"scale": 0.25}, {"soft_cap": 1.5}, {"bias": True, "scale": 3.0, "soft_cap": 2.0}]
)
def test_kinds_of_heads(head: dict[str, Any]) -> None:
    problem = Problem(**head)
    agree(problem.solve(OBJECTIVES["mix at 2"], chunk_tokens=5), problem.expected(OBJECTIVES["mix at 2"]))


@pytest.mark.parametrize("name", ["mix", "forward_kl", "top 1"])
def test_vocabulary_is_cut_on_both_sides_before_the_softmax(name: str) -> None:
    problem = Problem(rows=V + 3, teacher_rows=V + 11, bias=True)
    problem.labels %= V - 2
    found = problem.solve(OBJECTIVES[name], vocabulary=V - 2, chunk_tokens=5)
    agree(found, problem.expected(OBJECTIVES[name], vocabulary=V - 2))
    assert not found[2][1][V - 2 :].any()
    assert not found[2][2][V - 2 :].any()


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lengths", [[N], [4, 1, 0, 8], [1] * N, [2, 11]])
def test_policy_gradient_with_later_tokens(discount: float, lengths: list[int]) -> None:
    objective = Objective({"policy_gradient": 1.0, "cross_entropy": 0.5}, discount=discount, temperature=1.3)
    problem = Problem()
    found = problem.solve(objective, chunk_tokens=3, sequence_lengths=lengths)
    agree(found, problem.expected(objective, lengths=lengths))


@pytest.mark.parametrize("top_k", [1, 4, 9])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_stored_top_k(top_k: int, stored: torch.dtype) -> None:
    problem = Problem()
    log_p = torch.log_softmax(problem.teacher.head.logits(problem.teacher.hidden_NE), -1)
    values, tokens = log_p.topk(9, -1)
    targets = TopKTargets(values.to(stored), tokens.to(torch.int32))
    objective = Objective({"top_k_kl": 1.0, "cross_entropy": 0.3}, top_k=top_k)
    found = problem.solve(objective, targets, chunk_tokens=4)
    agree(found, problem.expected(objective, TopKTargets(values.to(stored), tokens)))
    if stored == torch.float32:
        agree(found, problem.expected(objective))  # the same as with the whole distribution


def test_stored_top_k_that_leaves_no_rest() -> None:
    """Rounding may leave a stored sum at or above 1: then nothing is outside, and nothing becomes NaN."""
    problem = Problem()
    targets = TopKTargets(torch.tensor([[0.0, -20.0]]).repeat(N, 1), torch.tensor([[3, 4]]).repeat(N, 1))
    total, _, gradients = problem.solve(single("top_k_kl", top_k=2), targets)
    assert torch.isfinite(total) and all(torch.isfinite(gradient).all() for gradient in gradients)
    expected = torch.nn.functional.cross_entropy(
        problem.head.logits(problem.hidden), torch.full((N,), 3), reduction="sum"
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_tied_head_adds_both_uses() -> None:
    embedding = torch.nn.Embedding(V, D)
    problem = Problem()
    tokens = torch.arange(N)
    hidden = torch.tanh(embedding(tokens))
    head = Head(embedding.weight)
    total, _ = linear_objective(hidden, head, problem.teacher, problem.labels, single("forward_kl"), chunk_tokens=4)
    (found,) = torch.autograd.grad(total, [embedding.weight])
    expected, _ = reference(torch.tanh(embedding(tokens)), head, problem.teacher, problem.labels, single("forward_kl"))
    close(found, torch.autograd.grad(expected, [embedding.weight])[0])


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias"])
def test_only_wanted_gradients(frozen: str) -> None:
    problem = Problem(bias=True)
    for name, tensor in zip(("hidden", "weight", "bias"), problem.inputs.copy(), strict=True):
        tensor.requires_grad_(name not in frozen)
    agree(problem.solve(single("jsd"), chunk_tokens=4), problem.expected(single("jsd")))


def test_the_teacher_gets_no_gradient() -> None:
    problem = Problem()
    teacher = FullTargets(
        problem.teacher.hidden_NE.requires_grad_(), Head(problem.teacher.head.weight_VD.requires_grad_())
    )
    problem.solve(single("forward_kl"), teacher)
    total, _ = linear_objective(
        problem.hidden.detach(), Head(problem.head.weight_VD.detach()), teacher, problem.labels, Objective()
    )
    assert not total.requires_grad


def test_the_incoming_gradient_scales_and_arrives_once() -> None:
    problem = Problem(bias=True)
    expected = problem.expected(single("forward_kl"))[2]
    total, sums = linear_objective(problem.hidden, problem.head, problem.teacher, problem.labels, Objective())
    gradients = torch.autograd.grad(total * 3 / N, problem.inputs, retain_graph=True)
    for found, reference_gradient in zip(gradients, expected, strict=True):
        close(found, reference_gradient * 3 / N)
    assert not sums["forward_kl"].requires_grad
    with pytest.raises(RuntimeError, match="expected one backward pass"):
        torch.autograd.grad(total, problem.inputs)


def test_gradients_are_differences_of_values() -> None:
    problem = Problem(torch.float64, bias=True, soft_cap=3.0)
    objective = Objective({"forward_kl": 1.0, "jsd": 0.5, "cross_entropy": 0.2})
    gradients = problem.solve(objective, chunk_tokens=4)[2]
    generator = torch.Generator().manual_seed(2)
    for tensor, gradient in zip(problem.inputs, gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                tensor += step * direction
                values.append(float(problem.value(objective)))
                tensor -= step * direction
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-7)


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_a_time", [10, 2**14])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_products_with_exact_softmax(
    autocast: bool, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 keeps 8 bits: logits of size 3 are off by about 0.01, and so are losses and gradients, relatively."""
    monkeypatch.setattr(chunks, "ROWS", rows_at_a_time)
    problem = Problem(torch.float32 if autocast else torch.bfloat16, bias=True)
    objective = Objective({"forward_kl": 1.0, "cross_entropy": 0.5})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, sums = linear_objective(
            problem.hidden, problem.head, problem.teacher, problem.labels, objective, chunk_tokens=4
        )
    gradients = torch.autograd.grad(total, problem.inputs)
    agree((total, sums, list(gradients)), problem.expected(objective), 2e-2)
    assert total.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in problem.inputs]
    if autocast:  # it did take the short cut
        assert abs(total.item() - problem.value(objective).item()) > 1e-4


def test_the_weight_gradient_is_summed_in_float32() -> None:
    """400 equal tokens, one a chunk: a bfloat16 sum would stop growing at 256 times the first term."""
    n = 400
    hidden = torch.ones(n, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(n, dtype=torch.long)
    total, _ = linear_objective(hidden, Head(weight), None, labels, single("cross_entropy"), chunk_tokens=1)
    (gradient,) = torch.autograd.grad(total, [weight])
    assert gradient.tolist() == [[-n / 2], [n / 2]]


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "at" not in name])
def test_extreme_logits_stay_finite(name: str) -> None:
    problem = Problem()
    with torch.no_grad():
        problem.hidden *= 1e3
        problem.teacher.hidden_NE.mul_(1e3)
    teacher = FullTargets(problem.teacher.hidden_NE, Head(problem.teacher.head.weight_VD))
    total, _, gradients = problem.solve(OBJECTIVES[name], teacher)
    assert torch.isfinite(total)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


# Work that is not done -----------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns, and how many matrix products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


@pytest.mark.parametrize("name", [*LOSSES, "mix at 2"])
def test_no_tensor_holds_all_logits(name: str) -> None:
    n, rows, chunk_tokens = 200, 300, 4
    problem = Problem(n=n, rows=rows, teacher_rows=rows, bias=True, soft_cap=5.0)
    objective = OBJECTIVES[name]
    with Largest() as largest:
        total, _ = linear_objective(
            problem.hidden, problem.head, problem.teacher, problem.labels, objective, chunk_tokens=chunk_tokens
        )
        total.backward()
    assert largest.numel == max(rows * D, chunk_tokens * rows)
    with Largest() as largest:
        reference(problem.hidden, problem.head, problem.teacher, problem.labels, objective)
    assert largest.numel >= n * rows  # the measurement sees such tensors


def test_evaluation_and_frozen_weights_cost_fewer_products() -> None:
    problem = Problem()
    arguments = (problem.teacher, problem.labels, Objective())

    def products(hidden: Tensor, head: Head) -> int:
        with Largest() as largest:
            linear_objective(hidden, head, *arguments, chunk_tokens=N)
        return largest.products

    assert products(problem.hidden, problem.head) == 4  # student, teacher, d/d hidden, d/d weight
    assert products(problem.hidden, Head(problem.head.weight_VD.detach())) == 3
    assert products(problem.hidden.detach(), problem.head) == 3
    with torch.no_grad():
        assert products(problem.hidden, problem.head) == 2


def test_without_gradient_the_values_are_the_same() -> None:
    problem = Problem()
    with torch.no_grad():
        value = problem.value(OBJECTIVES["mix"])
    assert not value.requires_grad
    assert value.item() == problem.value(OBJECTIVES["mix"]).item()


def test_no_tokens_no_loss_but_a_graph() -> None:
    problem = Problem(n=0, bias=True)
    total, sums, gradients = problem.solve(Objective(MIX, top_k=5, discount=0.5), sequence_lengths=[0, 0])
    assert total.item() == 0
    assert [value.item() for value in sums.values()] == [0] * len(MIX)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in problem.inputs]
    assert not any(gradient.any() for gradient in gradients)


def test_an_objective_without_teacher_needs_none() -> None:
    problem = Problem()
    agree(problem.solve(single("cross_entropy"), None), problem.expected(single("cross_entropy"), None))


def test_default_chunks() -> None:
    assert default_chunk_tokens(8192, 128256, 4096, "cuda") == 256  # N D / V = 256.0 with V / D rounded up
    assert default_chunk_tokens(8193, 128256, 4096, "cuda") == 512
    assert default_chunk_tokens(10, 128256, 4096, "cuda") == 128
    for tokens, vocabulary, hidden in ((8192, 49152, 576), (2048, 151936, 896)):
        assert 64 <= default_chunk_tokens(tokens, vocabulary, hidden, "cpu") <= tokens / 8


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(problem: Problem, objective: Objective, match: str, targets: Any = ..., **settings: Any) -> None:
    with pytest.raises(ValueError, match=match):
        problem.solve(objective, targets, **settings)


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    problem, teacher = Problem(), Problem().teacher
    shorter = FullTargets(teacher.hidden_NE[1:], teacher.head)
    refused(problem, Objective(), "expected targets of a teacher for forward_kl, found None", None)
    refused(problem, Objective(), "expected 13 targets, one per hidden state, found 12", shorter)
    refused(problem, Objective(), "expected a vocabulary of 1 to 37 tokens, found 38", vocabulary=V + 1)
    refused(Problem(rows=40), Objective(), "expected heads of equal size, found rows {'student': 40, 'teacher': 37}")
    refused(problem, single("top_k_kl", top_k=64), "expected a top_k of at most the vocabulary's 37 tokens, found 64")
    refused(
        problem,
        single("policy_gradient", discount=0.5),
        "expected sequence_lengths that add up to 13 tokens, found none",
    )
    refused(
        problem,
        single("policy_gradient", discount=0.5),
        "expected sequence_lengths that add up to 13 tokens, found 12 in 2 answers",
        sequence_lengths=[5, 7],
    )
    problem.labels[3] = -100
    refused(problem, single("cross_entropy"), "expected labels of tokens between 0 and 36, found -100 to")
    problem.labels = problem.labels[1:]
    refused(problem, Objective(), "expected 13 labels, one per hidden state, found 12")


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("top_k_kl", "cross_entropy")])
def test_a_stored_top_k_serves_top_k_kl_only(name: str) -> None:
    stored = TopKTargets(torch.full((N, 9), -3.0), torch.arange(9).repeat(N, 1))
    refused(Problem(), single(name), f"stored top k, found {name}; it needs the teacher itself", stored)


def test_a_stored_top_k_must_fit_the_objective() -> None:
    stored = TopKTargets(torch.full((N, 9), -3.0), torch.arange(30, 39).repeat(N, 1))
    refused(Problem(), single("top_k_kl"), "expected at least objective.top_k = 64 stored tokens, found 9", stored)
    refused(
        Problem(),
        single("top_k_kl", top_k=9, temperature=2.0),
        "expected temperature 1 with a teacher's stored",
        stored,
    )
    refused(
        Problem(),
        single("top_k_kl", top_k=9),
        "expected top-k targets of tokens between 0 and 36, found 30 to 38",
        stored,
    )
