"""Tokens per second, and where the time goes: rollout, teacher, student."""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from models.student import StudentModule
from program.ranges import Positive, check_arguments


class Throughput(Callback):
    """Log `throughput/tokens_per_second` (of all devices, prompts included) and the share of time per part.

    Args:
        every_n_steps: Optimizer steps between two entries.
    """

    def __init__(self, every_n_steps: Positive = 10) -> None:
        check_arguments(Throughput.__init__, locals(), "Throughput.")
        self.every_n_steps = every_n_steps
        self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting, again after every validation: its time is no training time."""
        assert isinstance(pl_module, StudentModule)
        pl_module.stopwatch.reset()
        self._started = time.perf_counter()
        self._first_step = trainer.global_step

    on_validation_end = on_train_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log and start again every so many steps."""
        assert isinstance(pl_module, StudentModule)
        steps = trainer.global_step - self._first_step
        if steps < self.every_n_steps:
            return
        elapsed = time.perf_counter() - self._started
        shares = {part: seconds / elapsed for part, seconds in pl_module.stopwatch.seconds.items()}
        shares["student"] = 1 - sum(shares.values())  # forward, backward, optimizer and data: all that is not set apart
        figures = {f"throughput/share_{part}": share for part, share in shares.items()}
        tokens = torch.as_tensor(pl_module.stopwatch.tokens, device=pl_module.device)
        figures["throughput/tokens_per_second"] = float(trainer.strategy.reduce(tokens, reduce_op="sum")) / elapsed
        figures["throughput/seconds_per_step"] = elapsed / steps
        pl_module.log_dict(figures)
        self.on_train_start(trainer, pl_module)
