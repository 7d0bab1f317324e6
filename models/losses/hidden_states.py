"""Hidden states of a student against those of a teacher.

Legend: N tokens, D hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def hidden_state_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Squared distance of the two states after each was divided by its length, shape (N,), between 0 and 4, without a unit.

    Equal to 2 (1 - cosine), so the scale of either model's states does not matter (Patient Knowledge Distillation, 1908.09355,
    loss L_PT).  The teacher receives no gradient; computed in float32.

    Raises:
        ValueError: The shapes differ.
    """
    if student_ND.shape != teacher_ND.shape:
        raise ValueError(
            f"expected hidden states of equal shape, found {tuple(student_ND.shape)} for the student and "
            f"{tuple(teacher_ND.shape)} for the teacher; compare layers of equal width"
        )
    student_ND, teacher_ND = (
        F.normalize(states_ND.to(torch.promote_types(states_ND.dtype, torch.float32)), dim=-1)
        for states_ND in (student_ND, teacher_ND.detach())
    )
    return (student_ND - teacher_ND).square().sum(-1)


def check_hidden_states(weight: float, layers: Mapping[int, int]) -> None:
    """Raise `ValueError` for a weight without layers or layers without a weight."""
    if (weight > 0) != bool(layers):
        raise ValueError(
            f"expected model.hidden_state_weight and model.hidden_state_layers together, found {weight} and "
            f"{dict(layers) or None}; set both, or neither"
        )
