"""The head and the objective in one: from final hidden states to the loss without ever holding the logits of all tokens.

The logits of a batch are the largest tensor of small-model training (8,192 tokens of a vocabulary of 49,152 are 1.6 GB in
float32, and a naive loss holds several such).  Here a chunk of tokens at a time goes through the student's and the teacher's
head, softmax and losses; its gradient is computed at once in closed form (`closed_form`), multiplied back through the head, and
the chunk is forgotten.  What remains for the backward pass is d/d hidden and d/d weight, which it scales by the incoming gradient.

Legend: N answer tokens, C tokens of a chunk, V vocabulary, D hidden of the student, E hidden of the teacher, K most probable
tokens of the teacher.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.losses.chunks import ChunkedLogits, Gradients, KnownGradients
from models.losses.closed_form import TeacherChunk, values_and_gradient
from models.losses.objective import Objective
from models.losses.output_head import Head
from models.losses.policy_gradient import advantages


@dataclass(frozen=True)
class FullTargets:
    """The teacher's whole distribution, not yet computed: its final hidden states at the answer positions, and its head."""

    hidden_NE: Tensor
    head: Head


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's K most probable tokens, the most probable first, at temperature 1; the rest is one tail."""

    log_probabilities_NK: Tensor
    tokens_NK: Tensor


Targets = FullTargets | TopKTargets


def linear_objective(
    hidden_ND: Tensor,
    head: Head,
    targets: Targets | None,
    labels_N: Tensor,
    objective: Objective,
    *,
    vocabulary: int | None = None,
    chunk_tokens: int = 0,
    sequence_lengths: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective summed over all answer tokens, in memory for one chunk of logits.

    Args:
        hidden_ND: The student's final hidden states at the positions that predict the answer tokens.
        head: The student's head.
        targets: What the teacher says at the same positions; None for an objective without teacher.
        labels_N: The answer tokens.
        objective: The mix of losses.
        vocabulary: Tokens that take part, cut on both sides before the softmax; needed where the heads differ in size.
        chunk_tokens: Tokens of a chunk at most; 0: `default_chunk_tokens`.
        sequence_lengths: Answer tokens of each sample, in order; needed by policy_gradient with a discount.

    Returns:
        The weighted sum, a scalar that can be differentiated once with respect to the hidden states, the head's weight and its
        bias (0, still connected, without tokens); each loss's unweighted sum by name, detached.  Nats; the caller divides by
        the number of tokens.

    Raises:
        ValueError: Shapes or sizes do not fit, or the targets hold too little for the objective.
    """
    vocabulary = _check(hidden_ND, head, targets, labels_N, objective, vocabulary)
    tokens, hidden = hidden_ND.shape
    chunk_tokens = chunk_tokens or default_chunk_tokens(tokens, vocabulary, hidden, hidden_ND.device.type)
    chunks = _equal_slices(tokens, longest=chunk_tokens)
    inputs = (hidden_ND, head.weight_VD, head.bias_V)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    student = ChunkedLogits(hidden_ND, head, vocabulary)
    teacher = _teacher(targets, objective, vocabulary, student.exact_dtype)
    with torch.no_grad():
        advantages_N = None
        if "policy_gradient" in objective.weights and objective.discount:
            advantages_N = _advantages(student, teacher, labels_N, objective, chunks, sequence_lengths)
        gradients = Gradients(student, head, wanted)
        sums = {name: hidden_ND.new_zeros((), dtype=student.exact_dtype) for name in objective.weights}
        for rows in chunks:
            logits_CV = student.logits(rows)
            slope_CV = student.head.slope(logits_CV) if any(wanted) else None
            values, gradient_CV = values_and_gradient(
                logits_CV,
                teacher(rows),
                labels_N[rows],
                None if advantages_N is None else advantages_N[rows],
                objective,
                gradient=any(wanted),
            )
            for name, value in values.items():
                sums[name] += value
            if gradient_CV is not None:
                gradients.add(rows, gradient_CV if slope_CV is None else gradient_CV.mul_(slope_CV))
        total = torch.stack([objective.weights[name] * value for name, value in sums.items()]).sum()
    if any(wanted):
        total = KnownGradients.apply(total, gradients.of_inputs(), *inputs)
    return total, sums


def default_chunk_tokens(tokens: int, vocabulary: int, hidden: int, device: str) -> int:
    """Tokens of a chunk.

    CUDA: the power of two at or above N D / V, so that a chunk's logits take about as much memory as all hidden states (Liger's
    rule), but at least 128.  CPU: 2^23 logits (32 MiB in float32), between 64 and 1,024 tokens.  Fewer tokens make the sum of the
    weight's gradient, a pass over (V, D) for every chunk, the most expensive part.
    """
    if device == "cuda":
        return max(128, 2 ** math.ceil(math.log2(max(1, math.ceil(tokens / math.ceil(vocabulary / hidden))))))
    return min(max(2**23 // vocabulary, 64), 1024)


def _equal_slices(length: int, *, longest: int) -> list[slice]:
    """As few slices as `longest` allows, of nearly equal length: the longest decides about memory."""
    count = math.ceil(length / longest)
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


def _teacher(
    targets: Targets | None, objective: Objective, vocabulary: int, dtype: torch.dtype
) -> Callable[[slice], TeacherChunk]:
    """What gives the teacher's side of a chunk."""
    if targets is None or not objective.needs_teacher:
        return lambda rows: TeacherChunk()
    if isinstance(targets, TopKTargets):
        log_p_NK, tokens_NK = targets.log_probabilities_NK.to(dtype), targets.tokens_NK.long()
        return lambda rows: TeacherChunk(
            log_p_CK=log_p_NK[rows, : objective.top_k], tokens_CK=tokens_NK[rows, : objective.top_k]
        )
    teacher = ChunkedLogits(targets.hidden_NE, targets.head, vocabulary)
    return lambda rows: TeacherChunk(log_p_CV=_log_softmax(teacher.logits(rows).to(dtype), objective))


def _advantages(
    student: ChunkedLogits,
    teacher: Callable[[slice], TeacherChunk],
    labels_N: Tensor,
    objective: Objective,
    chunks: Sequence[slice],
    sequence_lengths: Sequence[int] | None,
) -> Tensor:
    """A first pass for policy_gradient with a discount: a token's advantage depends on all later ones of its answer."""
    log_p_N, log_q_N = (torch.zeros_like(labels_N, dtype=student.exact_dtype) for _ in range(2))
    for rows in chunks:
        labels_C1 = labels_N[rows, None]
        log_p_CV = teacher(rows).log_p_CV
        assert log_p_CV is not None
        log_p_N[rows] = log_p_CV.gather(1, labels_C1)[:, 0]
        log_q_N[rows] = _log_softmax(student.logits(rows), objective).gather(1, labels_C1)[:, 0]
    return advantages(log_p_N, log_q_N, discount=objective.discount, sequence_lengths=sequence_lengths)


def _log_softmax(logits_CV: Tensor, objective: Objective) -> Tensor:
    return torch.log_softmax(logits_CV if objective.temperature == 1 else logits_CV / objective.temperature, dim=-1)


def _check(
    hidden_ND: Tensor,
    head: Head,
    targets: Targets | None,
    labels_N: Tensor,
    objective: Objective,
    vocabulary: int | None,
) -> int:
    """Refuse what does not fit together; returns how many tokens of the vocabulary take part."""
    rows = {"student": len(head.weight_VD)}
    lengths = {"labels": len(labels_N)}
    if objective.needs_teacher:
        if targets is None:
            raise ValueError(f"expected targets of a teacher for {', '.join(objective.weights)}, found None; pass them")
        if isinstance(targets, FullTargets):
            rows["teacher"] = len(targets.head.weight_VD)
            lengths["targets"] = len(targets.hidden_NE)
        else:
            check_stored_top_k(objective, targets.tokens_NK.shape[1])
            lengths["targets"] = len(targets.tokens_NK)
    if vocabulary is None and len(set(rows.values())) > 1:
        raise ValueError(f"expected heads of equal size, found rows {rows}; pass the vocabulary that both share")
    vocabulary = rows["student"] if vocabulary is None else vocabulary
    if not 1 <= vocabulary <= min(rows.values()):
        raise ValueError(f"expected a vocabulary of 1 to {min(rows.values())} tokens, found {vocabulary}; lower it")
    for name, length in lengths.items():
        if length != len(hidden_ND):
            raise ValueError(f"expected {len(hidden_ND)} {name}, one per hidden state, found {length}; select alike")
    if {"cross_entropy", "policy_gradient"} & set(objective.weights):
        _check_tokens("labels", labels_N, vocabulary)
    if isinstance(targets, TopKTargets) and objective.needs_teacher:
        _check_tokens("top-k targets", targets.tokens_NK, vocabulary)
    return vocabulary


def check_stored_top_k(objective: Objective, stored: int) -> None:
    """Raise `ValueError` where an objective needs more than a teacher's `stored` most probable tokens say."""
    exact = [name for name in objective.weights if name not in ("top_k_kl", "cross_entropy")]
    if exact:
        raise ValueError(
            f"expected top_k_kl or cross_entropy with a teacher's stored top k, found {exact[0]}; it needs the teacher itself"
        )
    if objective.temperature != 1:
        raise ValueError(
            f"expected temperature 1 with a teacher's stored top k, found {objective.temperature}; its tail is not known at others"
        )
    if stored < objective.top_k:
        raise ValueError(
            f"expected at least objective.top_k = {objective.top_k} stored tokens, found {stored}; lower it or store more"
        )


def _check_tokens(name: str, tokens: Tensor, vocabulary: int) -> None:
    # A look at a GPU would wait for it; its kernels check by themselves.
    if tokens.numel() and tokens.device.type == "cpu":
        lowest, highest = (int(bound) for bound in torch.aminmax(tokens))
        if lowest < 0 or highest >= vocabulary:
            raise ValueError(
                f"expected {name} of tokens between 0 and {vocabulary - 1}, found {lowest} to {highest}; "
                "pass answer positions only, and the vocabulary that student and teacher share"
            )
