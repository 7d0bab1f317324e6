"""Divergences between next-token distributions, in nats per token.

Throughout, P is the teacher and Q the student, both after dividing the logits by the loss temperature:

| name        | formula            | behaviour                                                    | source                 |
|-------------|--------------------|--------------------------------------------------------------|------------------------|
| forward KL  | KL(P || Q)         | mean-seeking: the student covers all that the teacher does   | Hinton, 1503.02531     |
| reverse KL  | KL(Q || P)         | mode-seeking: the student avoids what the teacher would not do | MiniLLM, 2306.08543  |
| JSD(beta)   | see `generalized_jsd` | between the two                                           | GKD, 2306.13649, eq. 1 |

Logits are upcast to float32 before the softmax: log-probabilities in bfloat16 alone cost percents of gradient accuracy.
The teacher receives no gradient.

Legend: N answer tokens, V vocabulary.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(P || Q) = sum_v P_v (log P_v - log Q_v) for every token, shape (N,), nats."""
    log_q_NV, log_p_NV = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return _kl(log_p_NV, log_q_NV)


def reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(Q || P) = sum_v Q_v (log Q_v - log P_v) for every token, shape (N,), nats."""
    log_q_NV, log_p_NV = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return _kl(log_q_NV, log_p_NV)


def generalized_jsd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """JSD_beta = beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, shape (N,), nats.

    The ends are *defined* as the KLs that GKD names for them: beta = 0 is forward KL, beta = 1 is reverse KL.  They are the
    limits of JSD_beta / beta and JSD_beta / (1 - beta), so the scale jumps there: change the learning rate with beta.

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
    log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
    return beta * _kl(log_p_NV, log_m_NV) + (1 - beta) * _kl(log_q_NV, log_m_NV)


def divergence(
    name: Divergence,
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence called `name`, shape (N,), nats; `beta` is used by `jsd` only."""
    if name == "jsd":
        return generalized_jsd(student_logits_NV, teacher_logits_NV, beta=beta, temperature=temperature)
    functions = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}
    return functions[name](student_logits_NV, teacher_logits_NV, temperature=temperature)


def _log_probabilities(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    log_q_NV = torch.log_softmax(student_logits_NV.float() / temperature, dim=-1)
    log_p_NV = torch.log_softmax(teacher_logits_NV.detach().float() / temperature, dim=-1)
    return log_q_NV, log_p_NV


def _kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """KL(A || B) from log-probabilities."""
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)
