import pytest
import torch

from models.losses import advantages, policy_gradient, reverse_kl
from tests.helpers.loss_references import discounted


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("lengths", [[1], [5], [16, 1, 0, 7, 33], [2, 2]])
def test_sums_over_later_tokens_of_the_same_answer(discount: float, lengths: list[int]) -> None:
    log_p, log_q = torch.randn(2, sum(lengths), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = advantages(log_p, log_q, discount=discount, sequence_lengths=lengths)
    torch.testing.assert_close(found, discounted(log_p - log_q, discount, lengths))


def test_no_answers() -> None:
    assert advantages(torch.zeros(0), torch.zeros(0), discount=0.5, sequence_lengths=[]).shape == (0,)


def test_value_and_gradient() -> None:
    log_q = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = policy_gradient(log_q, advantages(torch.tensor([-3.0, -0.5]), log_q))
    assert loss.tolist() == [2.0, -1.5]  # log Q - log P
    loss.sum().backward()
    assert log_q.grad.tolist() == [2.0, -1.5]  # -advantage


def test_expectation_is_reverse_kl_in_value_and_gradient() -> None:
    """Every token in turn is the sample; weighted by Q, detached, as sampling would."""
    student, teacher = torch.randn(2, 1, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    student.requires_grad_()
    log_q, log_p = torch.log_softmax(student, -1)[0], torch.log_softmax(teacher, -1)[0]
    expected_loss = (log_q.detach().exp() * policy_gradient(log_q, advantages(log_p, log_q))).sum()
    exact = reverse_kl(student, teacher).sum()
    torch.testing.assert_close(expected_loss, exact)
    torch.testing.assert_close(torch.autograd.grad(expected_loss, student), torch.autograd.grad(exact, student))


@pytest.mark.parametrize("lengths", [None, [3], [5, 1]])
def test_lengths_must_add_up(lengths: list[int] | None) -> None:
    with pytest.raises(ValueError, match="expected sequence_lengths that add up to 5 tokens, found"):
        advantages(torch.zeros(5), torch.zeros(5), discount=0.1, sequence_lengths=lengths)
