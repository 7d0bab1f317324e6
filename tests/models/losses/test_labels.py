"""Losses on labels against probabilities written out in double precision, in value and gradient."""

import re

import pytest
import torch
from torch import Tensor

from models.losses import FullTargets, Head
from models.losses.labels import LabelObjective, label_cross_entropy, label_logits, label_objective
from tests.helpers.loss_references import kl, reference_logits

N, V, D, E = 7, 23, 6, 5
VOCABULARY = 20  # tokens that take part; the teacher's head has more rows than the student's
TOKENS = torch.tensor([11, 3, 17])
OBJECTIVES = [
    LabelObjective(),
    LabelObjective(0.0, label_kl=0.7),
    LabelObjective(0.0, full_kl=2.0, temperature=0.5),
    LabelObjective(0.3, label_kl=1.5, full_kl=0.4, temperature=2.0),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weights() -> Tensor:
    """One-hot rows and graded ones."""
    graded = draw(N, 3, seed=1).softmax(-1)
    graded[:3] = torch.eye(3)
    return graded


@pytest.fixture
def labels(weights: Tensor) -> Tensor:
    return TOKENS[weights.argmax(-1)]


@pytest.fixture
def targets() -> FullTargets:
    return FullTargets(draw(N, E, seed=2), Head(draw(V + 4, E, seed=3)))


def head_with(kind: str) -> Head:
    weight, bias = draw(V, D, seed=4).requires_grad_(), draw(V, seed=5).requires_grad_()
    return {"plain": Head(weight), "all": Head(weight, bias, scale=0.7, soft_cap=3.0)}[kind]


def by_hand(
    hidden: Tensor, head: Head, targets: FullTargets, weights: Tensor, objective: LabelObjective
) -> tuple[Tensor, dict[str, float]]:
    """Probabilities first, then plain sums."""

    def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
        return (logits.double() / temperature).exp() / (logits.double() / temperature).exp().sum(-1, keepdim=True)

    ours = reference_logits(hidden, head, VOCABULARY)
    theirs = reference_logits(targets.hidden_NE, targets.head, VOCABULARY).detach()
    t = objective.temperature
    parts = {
        "cross_entropy": -(weights * probabilities(ours[:, TOKENS]).log()).sum(),
        "label_kl": kl(probabilities(theirs[:, TOKENS], t), probabilities(ours[:, TOKENS], t)).sum(),
        "full_kl": kl(probabilities(theirs, t), probabilities(ours, t)).sum(),
    }
    total = sum(getattr(objective, name) * value for name, value in parts.items())
    assert isinstance(total, Tensor)
    return total, {name: value.item() for name, value in parts.items() if getattr(objective, name)}


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: "+".join(objective.weights))
def test_value_and_gradient(
    objective: LabelObjective, kind: str, weights: Tensor, labels: Tensor, targets: FullTargets
) -> None:
    hidden, head = draw(N, D).requires_grad_(), head_with(kind)
    leaves = [leaf for leaf in (hidden, head.weight_VD, head.bias_V) if leaf is not None]
    total, sums = label_objective(
        hidden, head, targets, labels, weights, TOKENS, objective, vocabulary=VOCABULARY, chunk_tokens=3
    )
    expected, parts = by_hand(hidden, head, targets, weights, objective)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(parts, rel=1e-5)
    ours = torch.autograd.grad(2 * total, leaves)
    for gradient, theirs in zip(ours, torch.autograd.grad(2 * expected, leaves), strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-5)


def test_full_kl_is_label_kl_and_what_it_does_not_see(weights: Tensor, labels: Tensor, targets: FullTargets) -> None:
    """Chain rule: KL of the labels' share of the probability, and the two KLs within and outside it."""
    hidden, head = draw(N, D), head_with("plain")
    p, q = (
        reference_logits(h, a, VOCABULARY).softmax(-1) for h, a in ((targets.hidden_NE, targets.head), (hidden, head))
    )
    others = torch.tensor([token for token in range(VOCABULARY) if token not in TOKENS.tolist()])
    share_p, share_q = (torch.stack([x[:, TOKENS].sum(-1), x[:, others].sum(-1)], -1) for x in (p, q))
    outside = kl(*(x[:, others] / x[:, others].sum(-1, keepdim=True) for x in (p, q)))
    _, sums = label_objective(
        hidden, head, targets, labels, weights, TOKENS, LabelObjective(0.0, 1.0, 1.0), vocabulary=VOCABULARY
    )
    within = kl(*(x[:, TOKENS] / x[:, TOKENS].sum(-1, keepdim=True) for x in (p, q)))
    assert float(sums["label_kl"]) == pytest.approx(float(within.sum()), rel=1e-5)
    whole = kl(share_p, share_q) + share_p[:, 0] * within + share_p[:, 1] * outside
    assert float(sums["full_kl"]) == pytest.approx(float(whole.sum()), rel=1e-5)


def test_label_logits_are_exact_under_autocast() -> None:
    """bfloat16 products would give candidates the same score."""
    hidden, head = 1 + draw(200, 64).div(1000), Head(1 + draw(9, 64, seed=1).div(10))
    with torch.autocast("cpu", torch.bfloat16):
        logits = label_logits(hidden, head, torch.tensor([2, 5]))
        rounded = head.logits(hidden)[:, [2, 5]]
    assert logits.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    torch.testing.assert_close(logits, reference_logits(hidden, head)[:, [2, 5]].float())
    assert len(logits[:, 0].unique()) > 190 > 20 > len(rounded[:, 0].unique())


def test_no_samples_give_zero_that_is_connected(targets: FullTargets) -> None:
    hidden, head = torch.zeros(0, D, requires_grad=True), head_with("plain")
    none = FullTargets(targets.hidden_NE[:0], targets.head)
    nothing = torch.zeros(0, dtype=torch.long)
    total, _ = label_objective(
        hidden, head, none, nothing, torch.zeros(0, 3), TOKENS, LabelObjective(1, 1, 1), vocabulary=VOCABULARY
    )
    total.backward()
    assert total.item() == 0 and not head.weight_VD.grad.any()


def test_graded_labels_are_least_costly_at_their_own_probabilities(weights: Tensor) -> None:
    graded = weights[3:]
    lowest = label_cross_entropy(graded.log(), graded)
    torch.testing.assert_close(lowest, -(graded * graded.log()).sum(-1))
    assert (label_cross_entropy(graded.log() + draw(len(graded), 3, seed=9).div(10), graded) > lowest).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"cross_entropy": 0.0},
            "expected weights of at least 0 and one above 0 in model.objective, found cross_entropy 0",
        ),
        ({"label_kl": -1.0}, "found cross_entropy 1, label_kl -1, full_kl 0; change"),
        ({"full_kl": float("nan")}, "full_kl nan"),
        ({"temperature": 0.0}, "expected model.objective.temperature above 0, found 0"),
    ],
)
def test_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LabelObjective(**settings)


def test_a_kl_needs_a_teacher(weights: Tensor, labels: Tensor) -> None:
    with pytest.raises(
        ValueError, match="expected a teacher's targets for cross_entropy and full_kl, found None; pass"
    ):
        label_objective(draw(N, D), head_with("plain"), None, labels, weights, TOKENS, LabelObjective(full_kl=1.0))
