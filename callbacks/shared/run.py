"""Shared by structural callbacks: the data module, their order within one optimizer step, and the end of a step.

Pruning must come before the evaluation that reports it, that before the insertion of quantizers (so that "recovered" is
judged without them), and export after everything.
"""

from collections.abc import Sequence

from lightning import Callback, Trainer

from datamodules.base import ChatDataModule

STRUCTURAL_ORDER = ("GradualPruning", "PhaseEvaluation", "QuantizationAwareTraining", "ExportOnFitEnd")


def data_of(trainer: Trainer) -> ChatDataModule:
    """The run's data module; raises `ValueError` if there is none, or one that cannot score, calibrate and prompt."""
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, ChatDataModule):
        found = "none" if datamodule is None else type(datamodule).__name__
        raise ValueError(
            f"expected a data module that extends ChatDataModule, found {found}; use Conversations or ReasoningTasks, or "
            "write a subclass with load_split() (see datamodules/base.py)"
        )
    return datamodule


def check_order(callbacks: Sequence[Callback]) -> None:
    """Raise `ValueError` if structural callbacks are listed in another order than `STRUCTURAL_ORDER`, or twice."""
    found = [type(callback).__name__ for callback in callbacks if type(callback).__name__ in STRUCTURAL_ORDER]
    expected = [name for name in STRUCTURAL_ORDER if name in found]
    if found != expected:
        raise ValueError(
            f"expected the callbacks in the order {', '.join(expected)}, each once, found {', '.join(found)}; "
            "reorder trainer.callbacks in the recipe"
        )


class StepBoundary:
    """Tells the end of an optimizer step from the end of a micro-batch: `global_step` repeats while gradients accumulate."""

    def __init__(self) -> None:
        self._last = -1

    def start(self, step: int) -> None:
        """Note the step at which training starts or resumes: what happened at that step is not done again."""
        self._last = step

    def passed(self, step: int) -> bool:
        """Whether `step` is new since the last call."""
        is_new, self._last = step != self._last, step
        return is_new
