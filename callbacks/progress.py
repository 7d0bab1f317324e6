"""Progress bars of a run with an estimate: one over its optimizer steps, one for each validation, test or prediction."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from models.architecture import count_parameters
from models.student import StudentModule
from program.progress import Bar


class TrainingProgress(ProgressBar):
    """Lightning's progress in bars of `program.progress`; the command line adds it unless `trainer.enable_progress_bar` is false."""

    def __init__(self) -> None:
        super().__init__()
        self._training: Bar | None = None
        self._judging: Bar | None = None
        self._shown = True

    def disable(self) -> None:
        """Show nothing from now on."""
        self._shown = False

    def enable(self) -> None:
        """Show bars again."""
        self._shown = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what begins."""
        assert isinstance(pl_module, StudentModule)
        steps = f"{trainer.max_steps:,} steps" if trainer.max_steps > 0 else f"{trainer.max_epochs} epochs"
        rank_zero_info(
            f"Training {count_parameters(pl_module.student):,} parameters for {steps} on {pl_module.device.type} in "
            f"{trainer.precision}; results go to {trainer.default_root_dir}"
        )
        self._training = self._bar("Training", max(trainer.max_steps, 0) or None, "steps", initial=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Count optimizer steps."""
        bar, step = self._training, trainer.global_step
        if bar is None or step == bar.n:  # a micro-batch
            return
        if bar.is_due or step == bar.total:
            bar.set_postfix_str(_figures(self.get_metrics(trainer, pl_module), "train/"), refresh=False)
        bar.update(step - bar.n)
        if step == bar.total:
            self.on_train_end()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """A run may stop early, and the message of an error has lines of its own."""
        for bar in (self._judging, self._training):
            if bar is not None:
                bar.close()
        self._judging = self._training = None

    on_exception = on_train_end

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A bar for a validation; none for the check before training."""
        if not trainer.sanity_checking:
            when = f" at step {trainer.global_step}" if trainer.state.fn == "fit" else ""
            self._judging = self._bar(f"Validation{when}", sum(trainer.num_val_batches), "batches")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A bar for a test or predictions."""
        is_test = trainer.state.fn == "test"
        batches = trainer.num_test_batches if is_test else trainer.num_predict_batches
        self._judging = self._bar("Test" if is_test else "Prediction", sum(batches), "batches")

    on_predict_start = on_test_start

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count."""
        if self._judging is not None:
            self._judging.update()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what was found."""
        if self._judging is not None:
            self._judging.set_postfix_str(_figures(trainer.callback_metrics, "val/"), refresh=False)
            self._judging.close()
            self._judging = None

    on_test_end = on_predict_end = on_validation_end

    def _bar(self, what: str, total: float | None, unit: str, initial: int = 0) -> Bar:
        shown = {} if self._shown else {"disable": True}
        return Bar(desc=what, total=total, unit=unit, initial=initial, **shown)


def _figures(metrics: Any, prefix: str) -> str:
    return ", ".join(
        f"{name.removeprefix(prefix)} {float(value):.4g}" for name, value in metrics.items() if name.startswith(prefix)
    )
