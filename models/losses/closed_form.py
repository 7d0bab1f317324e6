"""The objectives' values and gradients in closed form, for one chunk of tokens in float32.

Every loss f is a function of log Q.  With g = df/d log Q taken as if the log Q_v were independent, the softmax turns it into

    df/dz = (g - Q sum_v g_v) / temperature

so a loss only needs its value and its g; terms c Q of g (c constant over v) cancel there and are left out.  With M the mixture:

| loss            | g_v                                                                                       |
|-----------------|-------------------------------------------------------------------------------------------|
| forward_kl      | -P                                                                                        |
| reverse_kl      | Q (log Q - log P)                                                                         |
| jsd             | (1 - beta) Q (log Q - log M)                                                              |
| skew_forward_kl | -(1 - skew) P Q / M                                                                       |
| skew_reverse_kl | Q (log Q - log M - skew Q / M)                                                            |
| total_variation | 1/2 Q sign(Q - P)                                                                         |
| top_k_kl        | -P_v in the top k, -P_rest Q_v / Q_rest outside                                           |
| policy_gradient | -advantage at the sampled token, 0 elsewhere                                              |
| cross_entropy   | -1 at the answer token, 0 elsewhere                                                       |

`divergences` and `policy_gradient` hold the definitions; tests compare values with them and gradients with autograd's.

Legend: C tokens of a chunk, V vocabulary, K most probable tokens of the teacher.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models.losses.divergences import log_mixture, log_rest, log_rest_outside, most_probable
from models.losses.objective import Objective


@dataclass(frozen=True)
class TeacherChunk:
    """What is known of the teacher's distribution: all of it, or its most probable tokens."""

    log_p_CV: Tensor | None = None
    log_p_CK: Tensor | None = None
    tokens_CK: Tensor | None = None


class StudentChunk:
    """The student's log-probabilities at the losses' temperature; probabilities are computed when first asked for."""

    def __init__(self, log_q_CV: Tensor) -> None:
        self.log_q_CV = log_q_CV

    @cached_property
    def q_CV(self) -> Tensor:
        """Probabilities, shape (C, V)."""
        return self.log_q_CV.exp()


def values_and_gradient(
    logits_CV: Tensor,
    teacher: TeacherChunk,
    labels_C: Tensor,
    advantages_C: Tensor | None,
    objective: Objective,
    *,
    gradient: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Each loss of the objective, and the gradient of their weighted sum.

    Logits are float32 or float64, the teacher's log-probabilities at the objective's temperature.  Without
    `advantages_C`, policy_gradient takes each token's own log-ratio.  Returned are the sum over the chunk of each
    unweighted loss, scalars by name, and d/d logits, shape (C, V), or None where no gradient is wanted.
    """
    tempered = [name for name in objective.weights if name != "cross_entropy"]
    groups = {objective.temperature: tempered} if tempered else {}
    if "cross_entropy" in objective.weights:
        groups[1.0] = [*groups.get(1.0, []), "cross_entropy"]
    sums: dict[str, Tensor] = {}
    total_CV = None
    for temperature, names in groups.items():
        student = StudentChunk(torch.log_softmax(logits_CV if temperature == 1 else logits_CV / temperature, dim=-1))
        part_CV = _one_temperature(student, names, teacher, labels_C, advantages_C, objective, sums, gradient)
        if part_CV is not None:
            part_CV = part_CV if temperature == 1 else part_CV.div_(temperature)
            total_CV = part_CV if total_CV is None else total_CV.add_(part_CV)
    return sums, total_CV


def _one_temperature(
    student: StudentChunk,
    names: list[str],
    teacher: TeacherChunk,
    labels_C: Tensor,
    advantages_C: Tensor | None,
    objective: Objective,
    sums: dict[str, Tensor],
    gradient: bool,
) -> Tensor | None:
    """Losses that share one softmax: adds their values to `sums`, returns their weighted d/d (logits / temperature)."""
    g_CV: Tensor | None = None  # the dense parts of g, weighted and summed
    label_g_C1 = None  # the parts at the answer token
    for name in names:
        weight = objective.weights[name]
        if name in DENSE:
            value, dense_CV = DENSE[name](student, teacher, objective)
            if gradient and weight:
                dense_CV = dense_CV if weight == 1 else dense_CV.mul_(weight)
                g_CV = dense_CV if g_CV is None else g_CV.add_(dense_CV)
            del dense_CV
        else:
            value, at_label_C1 = _at_label(name, student, teacher, labels_C[:, None], advantages_C)
            if gradient and weight:
                label_g_C1 = weight * at_label_C1 if label_g_C1 is None else label_g_C1 + weight * at_label_C1
        sums[name] = value
    if g_CV is None and label_g_C1 is None:
        return None
    sum_C1 = torch.zeros_like(student.log_q_CV[:, :1]) if g_CV is None else g_CV.sum(-1, keepdim=True)
    if label_g_C1 is not None:
        sum_C1 += label_g_C1
    gradient_CV = student.q_CV.mul_(-sum_C1) if g_CV is None else g_CV.addcmul_(student.q_CV, sum_C1, value=-1)
    return gradient_CV if label_g_C1 is None else gradient_CV.scatter_add_(1, labels_C[:, None], label_g_C1)


def _at_label(
    name: str, student: StudentChunk, teacher: TeacherChunk, labels_C1: Tensor, advantages_C: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Value and g of the losses that look at the answer token only; g has shape (C, 1)."""
    log_q_C1 = student.log_q_CV.gather(1, labels_C1)
    if name == "cross_entropy":
        return -log_q_C1.sum(), torch.full_like(log_q_C1, -1)
    if advantages_C is None:
        assert teacher.log_p_CV is not None
        advantages_C = (teacher.log_p_CV.gather(1, labels_C1) - log_q_C1)[:, 0]
    return -advantages_C.sum(), -advantages_C[:, None]


def _forward_kl(student: StudentChunk, teacher: TeacherChunk, _: Objective) -> tuple[Tensor, Tensor]:
    log_p_CV = _full(teacher)
    p_CV = log_p_CV.exp()
    value = (log_p_CV - student.log_q_CV).mul_(p_CV).sum()
    return value, p_CV.neg_()


def _reverse_kl(student: StudentChunk, teacher: TeacherChunk, _: Objective) -> tuple[Tensor, Tensor]:
    g_CV = (student.log_q_CV - _full(teacher)).mul_(student.q_CV)
    return g_CV.sum(), g_CV


def _jsd(student: StudentChunk, teacher: TeacherChunk, objective: Objective) -> tuple[Tensor, Tensor]:
    beta, log_p_CV = objective.beta, _full(teacher)
    if beta in (0, 1):
        return (_reverse_kl if beta else _forward_kl)(student, teacher, objective)
    scale = 1 / min(beta, 1 - beta) if objective.join_ends else 1
    log_m_CV = log_mixture(log_p_CV, student.log_q_CV, beta)
    g_CV = (student.log_q_CV - log_m_CV).mul_(student.q_CV).mul_(scale * (1 - beta))
    teacher_CV = (log_p_CV - log_m_CV).mul_(torch.exp(log_p_CV, out=log_m_CV))
    return g_CV.sum() + scale * beta * teacher_CV.sum(), g_CV


def _skew_forward_kl(student: StudentChunk, teacher: TeacherChunk, objective: Objective) -> tuple[Tensor, Tensor]:
    log_p_CV = _full(teacher)
    p_CV = log_p_CV.exp()
    log_ratio_CV = log_p_CV - log_mixture(log_p_CV, student.log_q_CV, objective.skew)  # log P/M
    value = p_CV.mul_(log_ratio_CV).sum()
    return value, log_ratio_CV.add_(student.log_q_CV).exp_().mul_(objective.skew - 1)


def _skew_reverse_kl(student: StudentChunk, teacher: TeacherChunk, objective: Objective) -> tuple[Tensor, Tensor]:
    log_ratio_CV = student.log_q_CV - log_mixture(student.log_q_CV, _full(teacher), objective.skew)  # log Q/M
    value = (log_ratio_CV * student.q_CV).sum()
    if objective.skew:
        log_ratio_CV.sub_(log_ratio_CV.exp(), alpha=objective.skew)
    return value, log_ratio_CV.mul_(student.q_CV)


def _total_variation(student: StudentChunk, teacher: TeacherChunk, _: Objective) -> tuple[Tensor, Tensor]:
    difference_CV = student.q_CV - _full(teacher).exp()
    value = difference_CV.abs().sum() / 2
    return value, difference_CV.sign_().mul_(student.q_CV).div_(2)


def _top_k_kl(student: StudentChunk, teacher: TeacherChunk, objective: Objective) -> tuple[Tensor, Tensor]:
    if teacher.log_p_CK is not None and teacher.tokens_CK is not None:
        log_p_CK, tokens_CK = teacher.log_p_CK, teacher.tokens_CK
        log_p_rest_C = log_rest(log_p_CK)
    else:
        log_p_CK, tokens_CK = most_probable(_full(teacher), objective.top_k)
        log_p_rest_C = log_rest_outside(_full(teacher), tokens_CK)
    p_CK = log_p_CK.exp()
    log_q_rest_C = log_rest_outside(student.log_q_CV, tokens_CK)
    rest_C = (log_p_rest_C > -math.inf) & (log_q_rest_C > -math.inf)  # nothing outside, or nowhere to put it: no bucket
    log_ratio_C = torch.where(rest_C, log_p_rest_C - log_q_rest_C, -math.inf)
    rest_values_C = torch.where(rest_C, log_p_rest_C.exp() * log_ratio_C, 0)
    value = (p_CK * (log_p_CK - student.log_q_CV.gather(1, tokens_CK))).sum() + rest_values_C.sum()
    return value, (student.log_q_CV + log_ratio_C[:, None]).exp_().neg_().scatter_(1, tokens_CK, -p_CK)


def _full(teacher: TeacherChunk) -> Tensor:
    assert teacher.log_p_CV is not None
    return teacher.log_p_CV


DENSE: dict[str, Callable[[StudentChunk, TeacherChunk, Objective], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "top_k_kl": _top_k_kl,
}
