"""Settings that would silently do nothing, or something wrong, are refused in one sentence."""

from types import SimpleNamespace
from typing import Any

import pytest

from models.generation.on_policy import OnPolicy, check_course, check_policy_gradient
from models.losses import Objective
from models.losses.hidden_states import check_hidden_states

KL, GRADIENT = Objective(), Objective({"policy_gradient": 1.0})


def objectives(dataset: Objective, own: Objective) -> dict[str, Objective]:
    return {"dataset": dataset, "fresh": own, "replay": own}


def test_policy_gradients_need_answers_that_were_just_sampled() -> None:
    check_policy_gradient(objectives(KL, GRADIENT), OnPolicy(start=0))
    check_policy_gradient(objectives(KL, KL), OnPolicy(start=0, replay_size=10))
    with pytest.raises(ValueError, match="on_policy_objective only .* found it for the answers of the data"):
        check_policy_gradient(objectives(GRADIENT, GRADIENT), OnPolicy(start=0))
    with pytest.raises(ValueError, match="without on_policy.replay_size, found it for replayed answers"):
        check_policy_gradient(objectives(KL, GRADIENT), OnPolicy(start=0, replay_size=10))


def trainer(max_steps: int = 10, *, val: bool = True) -> Any:
    return SimpleNamespace(max_steps=max_steps, datamodule=SimpleNamespace(has_split=lambda split: val))


def test_replay_needs_a_run_with_an_end() -> None:
    check_course(OnPolicy(replay_size=10), trainer())
    check_course(OnPolicy(), trainer(-1))
    with pytest.raises(ValueError, match="expected trainer.max_steps for on_policy.replay_size, found -1"):
        check_course(OnPolicy(replay_size=10), trainer(-1))


def test_stage_2_begins_before_the_run_ends() -> None:
    check_course(OnPolicy(start=9), trainer())
    check_course(OnPolicy(start=10), trainer(-1))
    with pytest.raises(
        ValueError, match=r"expected on_policy.start below trainer.max_steps \(10\), found 10, .*; lower it"
    ):
        check_course(OnPolicy(start=10), trainer())


def test_an_adaptive_share_needs_validation() -> None:
    check_course(OnPolicy(adaptive=0.1), trainer())
    check_course(OnPolicy(), trainer(val=False))
    with pytest.raises(ValueError, match="expected validation data for on_policy.adaptive, found none"):
        check_course(OnPolicy(adaptive=0.1), trainer(val=False))


@pytest.mark.parametrize(("weight", "layers"), [(0.0, {0: 1}), (0.5, {})])
def test_hidden_states_need_weight_and_layers(weight: float, layers: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="expected model.hidden_state_weight and model.hidden_state_layers together"):
        check_hidden_states(weight, layers)
