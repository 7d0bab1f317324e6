"""What a budget of computation is best spent on: how large a student, and how many tokens.

L(N, D) = E + A / N^alpha + B / D^beta, nats per token, for N parameters trained on D tokens (Hoffmann et al., 2203.15556, approach 3).
Two fits of the same law stand beside each other, because they differ by more than the differences that one would like to read off:
the published one, whose coefficients are rounded, and its replication (Besiroglu et al., 2404.10102), which found the first fit's
intervals implausibly narrow.  Both are of pre-training from scratch on web text.  A student that starts from a trained or pruned model,
or learns from a teacher's probabilities, needs fewer tokens: read the answer as an upper bound of tokens, and as an order of size.
(Distillation has a law of its own, 2502.08606; its coefficients are for its authors' family of models, and are not used here.)

Costs, in FLOPs: training 6 N D, a teacher's forward pass 2 N_teacher D (Kaplan et al., 2001.08361).
"""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Law:
    """One fit of L(N, D)."""

    source: str
    irreducible: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.irreducible + self.a / parameters**self.alpha + self.b / tokens**self.beta


LAWS = (
    Law("Hoffmann et al. 2022, 2203.15556 (rounded as published)", 1.69, 406.4, 0.34, 410.7, 0.28),
    Law("Besiroglu et al. 2024, 2404.10102 (replication)", 1.8172, 482.01, 0.3478, 2085.43, 0.3658),
)


@dataclass(frozen=True)
class Spent:
    """One way to spend a budget: student size, tokens that it pays for, and the loss that each law expects."""

    parameters: float
    tokens: float
    losses: tuple[float, ...]


def ways_to_spend(flops: float, teacher_parameters: float = 0.0, *, sizes: int = 41) -> list[Spent]:
    """Students of 10 million parameters up to the teacher's size (without one, 100 billion), each with all of the budget.

    Args:
        flops: The budget.
        teacher_parameters: Of a live teacher, asked about every token; 0 for none.
        sizes: Number of students, equally spaced by their logarithm.
    """
    low, high = math.log(1e7), math.log(teacher_parameters or 1e11)
    found = []
    for step in range(sizes):
        parameters = math.exp(low + (high - low) * step / (sizes - 1))
        tokens = flops / (6 * parameters + 2 * teacher_parameters)
        found.append(Spent(parameters, tokens, tuple(law.loss(parameters, tokens) for law in LAWS)))
    return found


def best(ways: list[Spent]) -> list[Spent]:
    """The way with the lowest loss, by each law."""
    return [min(ways, key=lambda way: way.losses[number]) for number in range(len(LAWS))]


def as_rows(ways: list[Spent]) -> list[dict[str, object]]:
    """For JSON."""
    return [asdict(way) for way in ways]
