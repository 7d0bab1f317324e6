"""Detects that a loss has stopped falling, from plain numbers, so that a resumed run answers the same."""

from statistics import fmean


class Plateau:
    """Compares the mean of the last `patience` losses with that of the `patience` before.

    Args:
        patience: Losses in each mean.
        min_delta: Share of the earlier mean by which the later one must be lower to count as falling.

    Attributes:
        losses: What was seen since the last `reset`, at most 2 * `patience` numbers.
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.losses: list[float] = []

    def add(self, loss: float) -> None:
        """Note the loss of one more optimizer step."""
        self.losses = [*self.losses, loss][-2 * self.patience :]

    def reset(self) -> None:
        """Forget what was before: the model is another one now."""
        self.losses = []

    @property
    def reached(self) -> bool:
        """Whether the loss has stopped falling; False until enough was seen."""
        if len(self.losses) < 2 * self.patience:
            return False
        before, after = fmean(self.losses[: self.patience]), fmean(self.losses[self.patience :])
        return after > before * (1 - self.min_delta)
