"""Divergences between next-token distributions, in nats per token (total variation has no unit).

Throughout, P is the teacher and Q the student, both after dividing the logits by the loss temperature:

| name                  | formula                          | behaviour                                        | source                 |
|-----------------------|----------------------------------|--------------------------------------------------|------------------------|
| forward KL            | KL(P || Q)                       | mean-seeking: the student covers all that the teacher does | Hinton, 1503.02531 |
| reverse KL            | KL(Q || P)                       | mode-seeking: the student avoids what the teacher would not do | MiniLLM, 2306.08543 |
| JSD(beta)             | see `generalized_jsd`            | between the two                                  | GKD, 2306.13649, eq. 1 |
| skew forward KL       | KL(P || skew P + (1 - skew) Q)   | forward KL with a bounded gradient where Q is tiny | DistiLLM, 2402.03898 |
| skew reverse KL       | KL(Q || (1 - skew) P + skew Q)   | reverse KL, bounded where P is tiny              | DistiLLM, 2402.03898   |
| total variation       | 1/2 sum_v |P_v - Q_v|            | between 0 and 1; weak gradient far from the teacher | f-distill, 2307.15190 |
| top-k KL              | forward KL over k tokens and the rest | forward KL from a teacher's stored top k    | `top_k_kl`             |

Logits are upcast to float32 (float64 stays) before the softmax: log-probabilities in bfloat16 alone cost percents of gradient
accuracy.  The teacher receives no gradient.  These functions are the definitions, differentiable by autograd; training goes
through `models.losses.chunked`, which computes the same values and gradients without ever holding all logits.

Legend: N answer tokens, V vocabulary, K most probable tokens of the teacher.
"""

import math

import torch
from torch import Tensor


def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(P || Q) = sum_v P_v (log P_v - log Q_v) for every token, shape (N,), nats."""
    log_q_NV, log_p_NV = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return _kl(log_p_NV, log_q_NV)


def reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(Q || P) = sum_v Q_v (log Q_v - log P_v) for every token, shape (N,), nats."""
    log_q_NV, log_p_NV = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return _kl(log_q_NV, log_p_NV)


def generalized_jsd(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    join_ends: bool = False,
) -> Tensor:
    """JSD_beta = beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, shape (N,), nats.

    The ends are *defined* as the KLs that GKD names for them: beta = 0 is forward KL, beta = 1 is reverse KL.  They are the
    limits of JSD_beta / beta and JSD_beta / (1 - beta), so the scale jumps there: change the learning rate with beta, or
    set `join_ends`, which divides the interior by min(beta, 1 - beta) and so makes the loss continuous in beta.

    Raises:
        ValueError: beta is outside 0..1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"expected beta between 0 and 1, found {beta}; 0 is forward KL, 1 is reverse KL")
    log_q_NV, log_p_NV = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    if beta == 0:
        return _kl(log_p_NV, log_q_NV)
    if beta == 1:
        return _kl(log_q_NV, log_p_NV)
    log_m_NV = log_mixture(log_p_NV, log_q_NV, beta)
    jsd_N = beta * _kl(log_p_NV, log_m_NV) + (1 - beta) * _kl(log_q_NV, log_m_NV)
    return jsd_N / min(beta, 1 - beta) if join_ends else jsd_N


def skew_forward_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(P || skew P + (1 - skew) Q) for every token, shape (N,), nats; skew 0 is forward KL (DistiLLM, 2402.03898)."""
    log_q_NV, log_p_NV = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return _kl(log_p_NV, log_mixture(log_p_NV, log_q_NV, skew))


def skew_reverse_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(Q || (1 - skew) P + skew Q) for every token, shape (N,), nats; skew 0 is reverse KL (DistiLLM, 2402.03898)."""
    log_q_NV, log_p_NV = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return _kl(log_q_NV, log_mixture(log_q_NV, log_p_NV, skew))


def total_variation(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """1/2 sum_v |P_v - Q_v| for every token, shape (N,), between 0 and 1 without a unit (f-distill, 2307.15190)."""
    log_q_NV, log_p_NV = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return (log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1) / 2


def top_k_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, top_k: int = 64, temperature: float = 1.0
) -> Tensor:
    """Forward KL between P and Q after all tokens but the teacher's top k have been merged into one, shape (N,), nats.

    sum_{k in K} P_k (log P_k - log Q_k) + P_rest (log P_rest - log Q_rest), where rest is the tail's total probability.  A
    lower bound of forward KL (data processing inequality), equal to it where the tails have the same shape.  Without the
    last term a student could move probability into the tail unpunished; renormalising the k instead is biased
    (Sparse Logit Sampling, 2503.16870).

    Raises:
        ValueError: top_k exceeds the vocabulary.
    """
    log_q_NV, log_p_NV = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    log_p_NK, tokens_NK = most_probable(log_p_NV, top_k)
    top_N = _kl(log_p_NK, log_q_NV.gather(1, tokens_NK))
    if top_k == log_p_NV.shape[1]:
        return top_N
    log_p_rest_N1, log_q_rest_N1 = (log_rest_outside(log_NV, tokens_NK)[:, None] for log_NV in (log_p_NV, log_q_NV))
    return top_N + _kl(log_p_rest_N1, log_q_rest_N1)


def log_mixture(log_a_NV: Tensor, log_b_NV: Tensor, share: float) -> Tensor:
    """log(share A + (1 - share) B) from log-probabilities, without leaving the logarithm.

    Raises:
        ValueError: The share is not in 0..1, 1 excluded.
    """
    if not 0 <= share < 1:
        raise ValueError(f"expected a skew of at least 0 and below 1, found {share}; 0 is the plain KL")
    if share == 0:
        return log_b_NV
    return torch.logaddexp(log_a_NV + math.log(share), log_b_NV + math.log1p(-share))


def most_probable(log_p_NV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids of the top k tokens, both (N, K), the most probable first.

    Raises:
        ValueError: top_k exceeds the vocabulary.
    """
    if top_k > log_p_NV.shape[1]:
        raise ValueError(
            f"expected a top_k of at most the vocabulary's {log_p_NV.shape[1]} tokens, found {top_k}; lower objective.top_k"
        )
    values_NK, tokens_NK = log_p_NV.topk(top_k, dim=-1)
    return values_NK, tokens_NK


def log_rest(log_p_NK: Tensor) -> Tensor:
    """log(1 - sum_k P_k), shape (N,): minus infinity where rounding leaves nothing."""
    return torch.log((-torch.expm1(log_p_NK.logsumexp(-1))).clamp(min=0))


def log_rest_outside(log_q_NV: Tensor, tokens_NK: Tensor) -> Tensor:
    """Logarithm of the total probability of all tokens but those named, shape (N,), exact however small it is."""
    return log_q_NV.scatter(1, tokens_NK, -math.inf).logsumexp(-1)


def _log_probabilities(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    log_q_NV, log_p_NV = (
        torch.log_softmax(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature, dim=-1)
        for logits_NV in (student_logits_NV, teacher_logits_NV.detach())
    )
    return log_q_NV, log_p_NV


def _kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """KL(A || B) from log-probabilities."""
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)
