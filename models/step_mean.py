"""Losses as means over the answer tokens of a whole optimizer step, however it is cut into micro-batches and ranks.

A mean over micro-batches of means over tokens weighs a token by the length of its neighbours' answers, so that the same data gives
another gradient with another batch size.  Here every token counts the same: the sum of a micro-batch is divided by the number of
answer tokens of all its fellows, on all ranks.
"""

import torch
from lightning import LightningModule
from torch import Tensor

from datamodules.collate import IGNORE_INDEX, Batch, OptimizerStep


class StepMean:
    """Turns sums over tokens into shares of the optimizer step's mean, by what the module's trainer knows of it."""

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._tokens: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    def start(self, num_tokens: int | Tensor) -> None:
        """Begin an optimizer step with so many answer tokens on this rank (a collective call)."""
        tokens = torch.zeros((), device=self._module.device).add_(num_tokens)
        self._tokens = self._module.trainer.strategy.reduce(tokens, reduce_op="sum").clamp(min=1)
        self._sums = {}

    def add(self, name: str, total: Tensor) -> None:
        """Collect a figure to log, summed over the tokens of a micro-batch."""
        self._sums[name] = self._sums.get(name, 0) + total.detach()

    def loss(self, total: Tensor) -> Tensor:
        """What `training_step` returns: Lightning divides by the micro-batches, the strategy averages over ranks."""
        trainer = self._module.trainer
        assert self._tokens is not None
        return total * (trainer.accumulate_grad_batches * trainer.world_size / self._tokens)

    def means(self) -> dict[str, Tensor]:
        """The figures, as means over this rank's part of the step; averaged over ranks they are the step's means."""
        assert self._tokens is not None
        return {name: total * self._module.trainer.world_size / self._tokens for name, total in self._sums.items()}


def step_of(batch: Batch, accumulate: int) -> OptimizerStep:
    """What the loader says about the optimizer step a micro-batch belongs to, see `datamodules.loader`.

    Raises:
        ValueError: It says nothing although gradients accumulate.
    """
    if "step" in batch:
        step: OptimizerStep = batch["step"]
        return step
    if accumulate != 1:
        raise ValueError(
            f"expected batches from a ChatDataModule when gradients accumulate over {accumulate} micro-batches, found "
            "batches that do not say how many answer tokens the optimizer step has; use Conversations or ReasoningTasks, "
            "or set trainer.accumulate_grad_batches to 1"
        )
    return OptimizerStep(0, 1, (batch["labels"][:, 1:] != IGNORE_INDEX).sum(), [batch])
