"""Checkpoints that a `kill -9` cannot spoil, each between two optimizer steps, and one more when the machine asks us to stop."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.shared.run import StepBoundary
from models.loading.checkpoint import read_checkpoint
from program.files import sweep, write_file
from program.ranges import Positive, check_arguments

_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGUSR1 is left for saving and requeueing
_SAME_REQUEST = 1.0  # seconds; launchers and terminals may send a signal to a process and again to its group


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write as `program/files.py` does; Lightning would go through the system's temporary folder, on another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save so that `path` holds either its old content or the complete new one."""

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # a full disk then is Python's error, which says so
                torch.save(checkpoint, file)

        write_file(Path(path), write)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load to the CPU as `read_checkpoint` does; raises `ValueError` unless it is plain data with its checksums."""
        if weights_only is False:
            raise ValueError(
                "expected weights_only true or null, found false: it would run what the checkpoint says; leave it out"
            )
        sweep(Path(path).absolute().parent)  # of a killed run, which goes on in another folder
        return read_checkpoint(Path(path))


class Checkpoint(ModelCheckpoint):
    """Keep `checkpoints/last.ckpt` of the run up to date, also when the machine asks us to stop.

    What is saved is the state between two optimizer steps, after the step's validation.  SIGTERM, SIGINT (Ctrl-C) and
    SIGHUP save after the present step and end the program with 143, 130 and 129; asked again, it stops at once.

    Args:
        every_n_steps: Optimizer steps between two saves; the end of training is always saved.
        dirpath: Folder of the checkpoint; by default `checkpoints` in the run's folder.
    """

    def __init__(self, every_n_steps: Positive = 100, dirpath: str | None = None) -> None:
        check_arguments(Checkpoint.__init__, locals(), "checkpoint.")
        super().__init__(dirpath, "last", every_n_train_steps=every_n_steps, enable_version_counter=False)
        self.every_n_steps = every_n_steps
        self._boundary = StepBoundary()
        self._due = False  # to be saved once the step's validation is over
        self._stopping = False  # on every rank
        self._asked: tuple[int, float] | None = None  # signal and time of the request to stop, on this rank

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Default to the run's folder whatever the logger calls its own, and make single-file saves atomic."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        trainer.fit_loop.__class__ = _ToTheEnd  # Lightning has no setting for it
        self.dirpath = self.dirpath or str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, only take note of signals: all devices stop together, after the same optimizer step.

        Lightning's would stop in the middle of a step.  The trainer restores the handlers of before `fit` at its end.
        """
        super().on_train_start(trainer, pl_module)
        self._due, self._stopping, self._asked = False, False, None
        self._boundary.start(trainer.global_step)
        self._handle(self._note)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """After an optimizer step, save when it is time, and stop every device if one of them was asked to."""
        if not self._boundary.passed(trainer.global_step):
            return
        self._stopping = trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False)
        self._due = self._stopping or trainer.global_step % self.every_n_steps == 0
        loop = trainer.fit_loop
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]  # set while it runs
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for the validation: what it changes belongs to the step."""
        if not trainer.sanity_checking:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: saves go by steps; and after an exception the last good checkpoint stays."""

    on_exception = on_train_epoch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state, with what other callbacks found out at the end; signals end the program at once again."""
        self._save_checkpoint(trainer, self._target())
        self._handle(None)

    def _save_if_due(self, trainer: Trainer) -> None:
        if self._due:
            self._save_checkpoint(trainer, self._target())
            self._due = False
        if self._stopping:
            rank_zero_info(f"Stopped after step {trainer.global_step}; go on with --ckpt_path {self._target()}")
            number = signal.SIGTERM if self._asked is None else self._asked[0]
            raise SIGTERMException(128 + number)

    def _note(self, number: int, _: Any) -> None:
        if self._asked is None:
            self._asked = number, time.monotonic()
            said = b"\nAsked to stop: saving after this optimizer step; asked again, it stops at once without saving\n"
            os.write(2, said)  # not print: the signal may come in the middle of one
        elif time.monotonic() - self._asked[1] > _SAME_REQUEST:
            self._handle(None)
            signal.raise_signal(number)

    @staticmethod
    def _handle(handler: Callable[[int, Any], None] | None) -> None:
        """Set the handler of all requests to stop, or Python's own; what is ignored (as by nohup) stays so."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _REQUESTS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, handler or default)

    def _target(self) -> str:
        assert self.dirpath is not None
        return os.path.join(self.dirpath, "last.ckpt")


class _ToTheEnd(_FitLoop):
    """A run that is resumed at its end has no step to take, but still what comes after the last: it judges, saves and reports."""

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train on."""
        return self.trainer.limit_train_batches == 0 or self.max_batches == 0
