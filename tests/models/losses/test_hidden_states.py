import pytest
import torch
from torch.nn import functional as F

from models.losses import hidden_state_loss


def test_twice_one_minus_cosine_whatever_the_scale() -> None:
    student, teacher = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    expected = 2 * (1 - F.cosine_similarity(student, teacher))
    torch.testing.assert_close(hidden_state_loss(student, teacher), expected)
    torch.testing.assert_close(hidden_state_loss(0.01 * student, 300 * teacher), expected)
    assert hidden_state_loss(student, -student).tolist() == pytest.approx([4.0] * 7)


def test_only_the_student_learns() -> None:
    student, teacher = (x.bfloat16().requires_grad_() for x in torch.randn(2, 7, 5))
    loss = hidden_state_loss(student, teacher)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert student.grad.any() and teacher.grad is None


def test_widths_must_agree() -> None:
    with pytest.raises(
        ValueError, match=r"found \(7, 5\) for the student and \(7, 6\) for the teacher; compare layers"
    ):
        hidden_state_loss(torch.zeros(7, 5), torch.zeros(7, 6))
