"""Learning one label: losses on the distribution over a few label tokens, at the one position that answers.

With Z the logits of the label tokens alone and V the whole vocabulary:

| loss          | formula, nats per sample                    | what it teaches                                          |
|---------------|---------------------------------------------|----------------------------------------------------------|
| cross_entropy | -sum_c w_c log softmax(Z)_c                 | the data's labels w; graded ones too                     |
| label_kl      | KL(softmax(Z_teacher) || softmax(Z))        | how the teacher weighs the labels                        |
| full_kl       | KL(P || Q) over all of V                    | the same, and how it shares out the rest of its probability |

The first two see the label tokens only: they say nothing about how probable all labels are together, and need only C rows of the
head.  Those are multiplied in float32 even under autocast: bfloat16 logits around 20 are 1/8 apart, and candidates would tie.

Legend: N samples, C classes, V vocabulary, D hidden of the student, E hidden of the teacher.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from torch import Tensor

from models.losses.chunked import FullTargets, linear_objective
from models.losses.divergences import forward_kl
from models.losses.objective import Objective
from models.losses.output_head import Head
from program.ranges import Between, check_fields


@dataclass(frozen=True)
class LabelObjective:
    """A weighted mix of losses per sample in nats; a loss of weight 0 is not computed.

    Args:
        cross_entropy: Weight of the negative log-likelihood of the data's label among the label tokens, without temperature.
        label_kl: Weight of KL(teacher || student) over the label tokens alone.
        full_kl: Weight of KL(teacher || student) over the whole vocabulary.
        temperature: Divides both models' logits in the two KLs.

    Raises:
        ValueError: A weight is negative, all are 0, or the temperature is not above 0.
    """

    cross_entropy: float = 1.0
    label_kl: float = 0.0
    full_kl: float = 0.0
    temperature: Annotated[float, Between(0, excluded=(0,), advice="1 leaves logits alone")] = 1.0

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "temperature"}
        if not all(0 <= weight < math.inf for weight in given.values()) or not any(given.values()):
            raise ValueError(
                f"expected weights of at least 0 and one above 0 in model.objective, found "
                f"{', '.join(f'{name} {weight:g}' for name, weight in given.items())}; change model.objective"
            )
        check_fields(self, "model.objective.")

    @property
    def weights(self) -> dict[str, float]:
        """The weights above 0 by name."""
        named = {"cross_entropy": self.cross_entropy, "label_kl": self.label_kl, "full_kl": self.full_kl}
        return {name: weight for name, weight in named.items() if weight}

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares with a teacher."""
        return bool(self.label_kl or self.full_kl)


def label_logits(hidden_ND: Tensor, head: Head, tokens_C: Tensor) -> Tensor:
    """Logits of the label tokens alone, shape (N, C), in float32 (float64 stays) whatever autocast says."""
    bias_C = None if head.bias_V is None else head.bias_V[tokens_C]
    rows = Head(head.weight_VD[tokens_C], bias_C, head.scale, head.soft_cap)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return rows.logits(hidden_ND.to(torch.promote_types(hidden_ND.dtype, torch.float32)))


def label_cross_entropy(logits_NC: Tensor, weights_NC: Tensor) -> Tensor:
    """-sum_c w_c log softmax(Z)_c for every sample, shape (N,), nats; the weights of a sample add up to 1."""
    return -(weights_NC.to(logits_NC.dtype) * logits_NC.log_softmax(-1)).sum(-1)


def label_objective(
    hidden_ND: Tensor,
    head: Head,
    targets: FullTargets | None,
    labels_N: Tensor,
    weights_NC: Tensor,
    tokens_C: Tensor,
    objective: LabelObjective,
    *,
    vocabulary: int | None = None,
    chunk_tokens: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective summed over samples.

    Hidden states, of student and teacher, are those at the position that answers, one for each sample, whose label is
    the token in `labels_N`.  `weights_NC` is the data's distribution over the classes, `tokens_C` the token of each.
    `vocabulary` tokens take part in full_kl (needed where the heads differ in size), of `chunk_tokens` samples at once,
    at most; 0 chooses.  Returned are the weighted sum, a scalar that can be differentiated once, and each loss's
    unweighted sum by name, detached.  Nats.

    Raises:
        ValueError: There is no teacher for a KL.
    """
    if objective.needs_teacher and targets is None:
        raise ValueError(
            f"expected a teacher's targets for {' and '.join(objective.weights)}, found None; pass them, or train on cross_entropy "
            "alone"
        )
    sums: dict[str, Tensor] = {}
    logits_NC = label_logits(hidden_ND, head, tokens_C)
    if objective.cross_entropy:
        sums["cross_entropy"] = label_cross_entropy(logits_NC, weights_NC).sum()
    if objective.label_kl and targets is not None:
        theirs_NC = label_logits(targets.hidden_NE, targets.head, tokens_C)
        sums["label_kl"] = forward_kl(logits_NC, theirs_NC, temperature=objective.temperature).sum()
    if objective.full_kl:
        whole = Objective({"forward_kl": 1.0}, temperature=objective.temperature)
        sums["full_kl"], _ = linear_objective(
            hidden_ND, head, targets, labels_N, whole, vocabulary=vocabulary, chunk_tokens=chunk_tokens
        )
    total = torch.stack([objective.weights[name] * value for name, value in sums.items()]).sum()
    return total, {name: value.detach() for name, value in sums.items()}
