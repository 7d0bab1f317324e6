"""What `Distillation` refuses: settings that contradict each other, or that would never take effect."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning import Trainer

from models.losses import Objective
from models.offline import is_offline
from models.on_policy import OnPolicy

if TYPE_CHECKING:
    from models.distillation import Distillation


def check_hidden_states(weight: float, layers: Mapping[int, int]) -> None:
    """Raise `ValueError` for a weight without layers or layers without a weight."""
    if (weight > 0) != bool(layers):
        raise ValueError(
            f"expected model.hidden_state_weight and model.hidden_state_layers together, found {weight} and "
            f"{dict(layers) or None}; set both, or neither"
        )


def check_policy_gradient(objectives: Mapping[Any, Objective], on_policy: OnPolicy) -> None:
    """Raise `ValueError` for policy gradients on answers that the student has not just sampled: its estimate needs these."""
    replays = on_policy.replay_size and "policy_gradient" in objectives["replay"].weights
    if replays or "policy_gradient" in objectives["dataset"].weights:
        raise ValueError(
            "expected policy_gradient in model.on_policy_objective only and without on_policy.replay_size, found it for "
            f"{'replayed answers' if replays else 'the answers of the data'}; it needs answers that were just sampled"
        )


def check_offline(module: "Distillation") -> None:
    """Raise `ValueError` if a captured teacher is asked about answers it has not seen, or for more than its answers."""
    if not is_offline(module.teacher_reference):
        return
    for name, live in (
        ("on_policy.start", module.own_answers.settings.start >= 0),
        ("hidden_state_layers", bool(module.hidden_state_layers)),
        ("teacher_dtype", module.teacher_dtype != "auto"),
    ):
        if live:
            raise ValueError(
                f"expected a live teacher for model.{name}, found {module.teacher_reference!r}, which holds final answers to "
                f"the data only; leave {name} out, or name the teacher's model"
            )


def check_course(on_policy: OnPolicy, trainer: Trainer) -> None:
    """Raise `ValueError` for settings of stage 2 that would never take effect in this run."""
    data = getattr(trainer, "datamodule", None)
    if 0 < trainer.max_steps <= on_policy.start:
        raise ValueError(
            f"expected on_policy.start below trainer.max_steps ({trainer.max_steps}), found {on_policy.start}, so that stage 2 would never "
            "begin; lower it, or set it to -1 for stage 1 alone"
        )
    if on_policy.replay_size and trainer.max_steps <= 0:
        raise ValueError(
            f"expected trainer.max_steps for on_policy.replay_size, found {trainer.max_steps}; the share of replayed answers "
            "grows over the run, so set its length, or leave replay_size out"
        )
    if on_policy.adaptive and data is not None and not data.has_split("val"):
        raise ValueError(
            "expected validation data for on_policy.adaptive, found none; add it, or let the share rise by on_policy.ramp"
        )
