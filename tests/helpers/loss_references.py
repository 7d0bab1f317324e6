"""The objectives written out independently of the project's code: probabilities, plain sums, double precision, autograd."""

from dataclasses import replace

import torch
from torch import Tensor

from models.losses import FullTargets, Head, Objective, TopKTargets


def reference_logits(hidden: Tensor, head: Head, vocabulary: int | None = None) -> Tensor:
    logits = hidden.double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits = logits + head.bias_V.double()
    logits = logits * head.scale
    if head.soft_cap is not None:
        logits = torch.tanh(logits / head.soft_cap) * head.soft_cap
    return logits[:, :vocabulary]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def dense(name: str, q: Tensor, p: Tensor, objective: Objective) -> Tensor:
    """Losses of two distributions, per token."""
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jsd":
        beta = objective.beta
        if beta in (0, 1):
            return kl(q, p) if beta else kl(p, q)
        m = beta * p + (1 - beta) * q
        return (beta * kl(p, m) + (1 - beta) * kl(q, m)) / (min(beta, 1 - beta) if objective.join_ends else 1)
    if name == "skew_forward_kl":
        return kl(p, objective.skew * p + (1 - objective.skew) * q)
    if name == "skew_reverse_kl":
        return kl(q, objective.skew * q + (1 - objective.skew) * p)
    if name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    raise AssertionError(name)


def merged_kl(q: Tensor, p_top: Tensor, tokens: Tensor) -> Tensor:
    """Forward KL of top tokens and one rest, token by token."""
    losses = []
    for row, (p_row, token_row) in enumerate(zip(p_top, tokens.tolist(), strict=True)):
        loss = sum(p * (p / q[row, token]).log() for p, token in zip(p_row, token_row, strict=True))
        others = [token for token in range(q.shape[1]) if token not in token_row]
        p_rest = 1 - p_row.sum()
        losses.append(loss + p_rest * (p_rest / q[row, others].sum()).log() if others else loss)
    return torch.stack(losses)


def discounted(log_ratios: Tensor, discount: float, lengths: list[int]) -> Tensor:
    """Every token's sum on its own."""
    sums: list[float] = []
    remaining = log_ratios.tolist()
    for length in lengths:
        answer, remaining = remaining[:length], remaining[length:]
        sums += [sum(discount**later * x for later, x in enumerate(answer[token:])) for token in range(length)]
    return torch.tensor(sums, dtype=torch.float64)


def reference(
    hidden: Tensor,
    head: Head,
    targets: FullTargets | TopKTargets | None,
    labels: Tensor,
    objective: Objective,
    vocabulary: int | None = None,
    lengths: list[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `linear_objective` should return, with everything in memory and gradients by autograd."""
    logits = reference_logits(hidden, head, vocabulary)
    rows = torch.arange(len(labels))
    q = torch.softmax(logits / objective.temperature, -1)
    p = None
    if isinstance(targets, FullTargets):
        teacher_logits = reference_logits(targets.hidden_NE, targets.head, vocabulary).detach()
        p = torch.softmax(teacher_logits / objective.temperature, -1)
    sums, total = {}, torch.zeros((), dtype=torch.float64)
    for name, weight in objective.weights.items():
        if name == "cross_entropy":
            value = gradient_of = -torch.softmax(logits, -1)[rows, labels].log().sum()
        elif name == "policy_gradient":
            log_ratios = (p[rows, labels] / q[rows, labels]).log().detach()
            advantages = discounted(log_ratios, objective.discount, lengths or [1] * len(labels))
            value, gradient_of = -advantages.sum(), -(advantages * q[rows, labels].log()).sum()
        elif name == "top_k_kl":
            if isinstance(targets, TopKTargets):
                p_top = targets.log_probabilities_NK[:, : objective.top_k].double().exp()
                tokens = targets.tokens_NK[:, : objective.top_k]
            else:
                p_top, tokens = p.topk(objective.top_k, -1)
            value = gradient_of = merged_kl(q, p_top, tokens).sum()
        else:
            value = gradient_of = dense(name, q, p, objective).sum()
        sums[name] = value.detach()
        total = total + weight * (gradient_of + (value - gradient_of).detach())
    return total, sums


def single(name: str, **settings: object) -> Objective:
    return replace(Objective({name: 1.0}), **settings)
