"""Scaling laws against numbers by hand, and what a budget pays for."""

import pytest

from models.planning.scaling import LAWS, best, ways_to_spend


def test_losses_by_hand() -> None:
    """Chinchilla itself: 70 billion parameters on 1.4 trillion tokens."""
    assert LAWS[0].loss(70e9, 1.4e12) == pytest.approx(1.69 + 0.0837 + 0.1633, abs=1e-3)


def test_all_of_the_budget_is_spent() -> None:
    for way in ways_to_spend(1e21, teacher_parameters=7e10):
        assert 6 * way.parameters * way.tokens + 2 * 7e10 * way.tokens == pytest.approx(1e21)


def test_the_replication_finds_about_twenty_tokens_a_parameter() -> None:
    """As the paper's other two approaches do; the rounded fit does not (2404.10102)."""
    rounded, replicated = best(ways_to_spend(5.76e23, sizes=400))
    assert 12 < replicated.tokens / replicated.parameters < 30
    assert replicated.parameters == pytest.approx(70e9, rel=0.4)
    assert rounded.tokens / rounded.parameters > 40


def test_a_teacher_makes_larger_students_worth_it() -> None:
    alone, taught = best(ways_to_spend(1e20, sizes=200)), best(ways_to_spend(1e20, 1e11, sizes=200))
    assert all(
        with_teacher.parameters > without.parameters for with_teacher, without in zip(taught, alone, strict=True)
    )
