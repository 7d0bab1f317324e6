"""Reverse KL by policy gradient: only the probabilities of the sampled tokens are compared.

    advantage_t = sum_{t' >= t} discount^(t' - t) (log P(y_t') - log Q(y_t'))        detached
    loss_t      = -(Q(y_t) / Q(y_t) detached) * advantage_t                          value -advantage_t, nats
    d loss_t    = -advantage_t d log Q(y_t)

With answers sampled from Q, discount 0 is an unbiased one-sample estimate of each token's reverse KL and of its gradient
(Thinking Machines, "On-Policy Distillation", 2025); discount 1 also credits a token with what it leads to (MiniLLM, 2306.08543,
without its variance reductions).  High variance: where the teacher's whole distribution is at hand, `reverse_kl` is exact.

Legend: N answer tokens of several answers, one after the other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def advantages(
    teacher_log_p_N: Tensor,
    student_log_q_N: Tensor,
    *,
    discount: float = 0.0,
    sequence_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Log-ratio of each sampled token plus the discounted ones after it in the same answer, shape (N,), nats, detached.

    The two are log P and log Q of the sampled tokens.  `discount` is the weight of later tokens, per token of distance;
    it needs `sequence_lengths`, the tokens of each answer, in order.

    Raises:
        ValueError: With a discount, the lengths are missing or do not add up to N.
    """
    sums_N = (teacher_log_p_N - student_log_q_N).detach()
    if not discount:
        return sums_N
    if sequence_lengths is None or sum(sequence_lengths) != len(sums_N):
        found = "none" if sequence_lengths is None else f"{sum(sequence_lengths)} in {len(sequence_lengths)} answers"
        raise ValueError(
            f"expected sequence_lengths that add up to {len(sums_N)} tokens, found {found}; pass the tokens of every answer"
        )
    after = [left for length in sequence_lengths for left in range(length - 1, -1, -1)]
    after_N = torch.tensor(after, device=sums_N.device)  # tokens that follow in the same answer
    reach = 1
    while reach < max(sequence_lengths, default=0):  # sums over `reach` tokens become sums over twice as many
        further_N = torch.where(after_N[:-reach] >= reach, sums_N[reach:], 0)
        sums_N = torch.cat([sums_N[:-reach] + discount**reach * further_N, sums_N[-reach:]])
        reach *= 2
    return sums_N


def policy_gradient(student_log_q_N: Tensor, advantages_N: Tensor) -> Tensor:
    """-advantage for every token, shape (N,), nats, with the gradient -advantage d log Q."""
    return -(student_log_q_N - student_log_q_N.detach()).exp() * advantages_N
