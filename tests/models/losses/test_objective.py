import math
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from models.losses import Objective


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"kl": 1.0}}, "expected objective.weights to name losses among forward_kl, .*, found 'kl'"),
        ({"weights": {"jsd": -1.0}}, "expected a weight of at least 0 for jsd, found -1.0"),
        ({"weights": {"jsd": math.nan}}, "expected a weight of at least 0 for jsd, found nan"),
        ({"weights": {}}, "expected at least one positive weight, found {}"),
        ({"weights": {"jsd": 0.0}}, "expected at least one positive weight"),
        ({"temperature": 0.0}, "expected objective.temperature above 0, found 0;"),
        ({"beta": 1.5}, "expected objective.beta between 0 and 1, found 1.5"),
        ({"skew": 1.0}, r"expected objective.skew between 0 and 1 \(1 excluded\), found 1"),
        ({"top_k": 0}, "expected objective.top_k between 1 and 1,000,000,000, found 0"),
        ({"discount": math.nan}, "expected objective.discount between 0 and 1, found nan"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


def test_a_recipe_states_it_as_a_mapping() -> None:
    parser = ArgumentParser()
    parser.add_argument("--objective", type=Objective, default=Objective())
    text = "{weights: {jsd: 1.0, cross_entropy: 0.1}, beta: 0.2}"
    parsed = parser.instantiate_classes(parser.parse_args(["--objective", text])).objective
    assert parsed == Objective({"jsd": 1.0, "cross_entropy": 0.1}, beta=0.2)


def test_only_comparisons_need_a_teacher() -> None:
    assert not Objective({"cross_entropy": 1.0}).needs_teacher
    assert Objective({"cross_entropy": 1.0, "policy_gradient": 1.0}).needs_teacher
