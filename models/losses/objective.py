"""The objective of a student: a weighted mix of per-token losses, as a recipe states it."""

import math
from dataclasses import dataclass, field
from typing import Annotated

from program.ranges import Between, Positive, Share, check_fields

TEMPERED = {
    "forward_kl": "KL(teacher || student)",
    "reverse_kl": "KL(student || teacher)",
    "jsd": "generalized Jensen-Shannon divergence, between the two KLs (see beta)",
    "skew_forward_kl": "forward KL to a mixture with the teacher (see skew)",
    "skew_reverse_kl": "reverse KL to a mixture with the student (see skew)",
    "total_variation": "half the L1 distance of the probabilities",
    "top_k_kl": "forward KL over the teacher's top_k tokens and one bucket for the rest",
    "policy_gradient": "one-sample estimate of reverse KL on the student's own answers (see discount)",
}
LOSSES = TEMPERED | {"cross_entropy": "negative log-likelihood of the answer token, without temperature"}


@dataclass(frozen=True)
class Objective:
    """A weighted mix of per-token losses in nats.

    Args:
        weights: Weight of each loss by name: forward_kl is KL(teacher || student), reverse_kl is KL(student || teacher), jsd is
            between them, skew_forward_kl and skew_reverse_kl are DistiLLM's, total_variation, top_k_kl, policy_gradient,
            cross_entropy.  A loss of weight 0 is computed and logged but not trained on.
        temperature: Divides both models' logits in every loss but cross_entropy.
        beta: Position of jsd between forward KL (0) and reverse KL (1).
        join_ends: Divide jsd by min(beta, 1 - beta), so that its ends join the two KLs and one learning rate serves all betas.
        skew: Share mixed in by skew_forward_kl (of the teacher) and skew_reverse_kl (of the student).
        top_k: Tokens that top_k_kl distinguishes; all others are one bucket.
        discount: Weight of later tokens' log-ratios in policy_gradient, per token of distance: 0 is each token on its own,
            1 is MiniLLM's undiscounted sum.

    Raises:
        ValueError: A name is unknown or a number is out of its range.
    """

    weights: dict[str, float] = field(default_factory=lambda: {"forward_kl": 1.0})
    temperature: Annotated[float, Between(0, excluded=(0,))] = 1.0
    beta: Share = 0.5
    join_ends: bool = False
    skew: Annotated[float, Between(0, 1, (1,))] = 0.1
    top_k: Positive = 64
    discount: Share = 0.0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(LOSSES))
        if unknown:
            raise ValueError(
                f"expected objective.weights to name losses among {', '.join(LOSSES)}, found {unknown[0]!r}"
            )
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"expected a weight of at least 0 for {name}, found {weight}; change objective.weights"
                )
        if not any(self.weights.values()):
            raise ValueError(f"expected at least one positive weight, found {self.weights}; change objective.weights")
        check_fields(self, "objective.")

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares with a teacher."""
        return any(name in TEMPERED for name in self.weights)
