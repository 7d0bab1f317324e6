"""Checkpoints that a `kill -9` cannot spoil, and one more when the machine asks us to stop."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.order import StepBoundary
from models.checkpoint import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary name in the same folder, flush to disk, rename.

    Lightning's own way goes through the system's temporary folder, which may be another disk, where moving is copying.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save so that `path` holds either its old content or the complete new one."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")  # always the same: what a killed save left is overwritten
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load to the CPU what holds plain data only and agrees with its checksums, see `read_checkpoint`.

        Raises:
            ValueError: It does not; or anything else is asked for.
        """
        if weights_only is False:
            raise ValueError(
                "expected weights_only true or null, found false: it would run what the checkpoint says; leave it out"
            )
        return read_checkpoint(Path(path))


class Checkpoint(ModelCheckpoint):
    """Keep `checkpoints/last.ckpt` of the run up to date, also on SIGTERM.

    Args:
        every_n_steps: Optimizer steps between two saves; the end of training is always saved.
        dirpath: Folder of the checkpoint; by default `checkpoints` in the run's folder.
    """

    def __init__(self, every_n_steps: int = 100, dirpath: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"expected checkpoint.every_n_steps of 1 or more, found {every_n_steps}; change it in the recipe"
            )
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_train_steps=every_n_steps,
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self._asked_to_stop = False
        self._boundary = StepBoundary()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Default to the run's folder whatever the logger calls its own, and make single-file saves atomic."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.dirpath = self.dirpath or str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With several devices, only take note of SIGTERM: they stop together, after the same optimizer step.

        Lightning's own handler starts a collective wherever its rank happens to be, and ranks that are signalled at once hang.
        The trainer puts the handlers of before `fit` back at its end.
        """
        super().on_train_start(trainer, pl_module)
        self._asked_to_stop = False
        self._boundary.start(trainer.global_step)
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time; stop every device if one of them was asked to."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (
            trainer.world_size > 1
            and self._boundary.passed(trainer.global_step)
            and trainer.strategy.reduce_boolean_decision(self._asked_to_stop, all=False)
        ):
            raise SIGTERMException

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state, with what other callbacks found out at the end."""
        self._save_checkpoint(trainer, self._target())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when asked to stop; after any other exception the last good checkpoint stays."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit":
            self._save_checkpoint(trainer, self._target())

    def _note(self, *_: Any) -> None:
        self._asked_to_stop = True

    def _target(self) -> str:
        assert self.dirpath is not None
        return os.path.join(self.dirpath, "last.ckpt")
