"""The order in which structural callbacks act within one optimizer step, checked before anything runs.

Lightning calls callbacks in list order.  Pruning must come before the evaluation that reports it, that before the insertion
of quantizers (so that "recovered" is judged without them), and export after everything.
"""

from collections.abc import Sequence

from lightning import Callback

STRUCTURAL_ORDER = ("GradualPruning", "PhaseEvaluation", "QuantizationAwareTraining", "ExportOnFitEnd")


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
        if step == self._last:
            return False
        self._last = step
        return True
