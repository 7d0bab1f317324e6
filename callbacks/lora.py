"""LoRA: the student's weights stay frozen and small adapters beside its linear layers are trained."""

from collections.abc import Sequence
from typing import Annotated

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.pruning.gradual_pruning import GradualPruning
from callbacks.quantization import QuantizationAwareTraining
from models.structure.adapters import Projection, check_peft, projections
from models.student import StudentModule
from program.ranges import Between, Positive, check_arguments


class LoRA(Callback):
    """Train low-rank adapters instead of the weights (arXiv 2106.09685): hardly any gradients and optimizer state.

    The adapters are merged into the weights wherever the student generates or is exported, so that the exported student is an
    ordinary model.  Use a higher learning rate than for all weights, about ten times.

    Args:
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank.
        dropout: Probability with which an adapter's input is dropped, 0 to 1 (1 excluded).
        modules: Linear layers of every decoder layer that get an adapter; by default all of them.

    Raises:
        ModuleNotFoundError: The package peft is not installed.
        ValueError: A setting is out of range, or the recipe also prunes or quantizes during training.
    """

    needs_whole_student = True

    def __init__(
        self,
        rank: Positive = 16,
        alpha: Annotated[float, Between(0, excluded=(0,))] = 32.0,
        dropout: Annotated[float, Between(0, 1, (1,))] = 0.0,
        modules: Sequence[Projection] | None = None,
    ) -> None:
        check_arguments(LoRA.__init__, locals(), "LoRA.")
        check_peft()
        self.settings = {"rank": rank, "alpha": alpha, "dropout": dropout}
        self.modules = modules

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Insert the adapters before the optimizer is built; a checkpoint that loads afterwards fills them."""
        if stage != "fit":
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradualPruning | QuantizationAwareTraining):
                raise ValueError(
                    f"expected LoRA without {type(callback).__name__}, found both, which would change the same layers; "
                    "train with LoRA first, and start the other from its student/ folder"
                )
        assert isinstance(pl_module, StudentModule)
        pl_module.configure_model()
        modules = projections(pl_module.student) if self.modules is None else list(self.modules)
        edit = {"op": "lora", **self.settings, "modules": modules}
        if edit in pl_module.edits:
            return
        pl_module.edit([edit])
        trainable = sum(p.numel() for p in pl_module.student.parameters() if p.requires_grad)
        rank_zero_info(f"LoRA of rank {self.settings['rank']}: {trainable:,} trainable parameters")
