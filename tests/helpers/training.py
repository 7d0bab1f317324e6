"""A trainer for tiny students, and a callback that edits in the middle of `fit`."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from datamodules.collate import Batch
from models.quantization import freeze_scales
from models.structure.edits import Edit
from tests.helpers.tiny import tiny_batch

EDITS: dict[int, list[Edit]] = {
    2: [
        {"op": "narrow_mlp", "layer": 0, "keep": list(range(0, 48, 2))},
        {"op": "narrow_kv_groups", "layer": 1, "keep": [1]},
    ],
    3: [
        {
            "op": "fake_quantize",
            "format": "fp8_e4m3",
            "modules": ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"],
        }
    ],
}
FREEZE_AT = 5


class Editing(Callback):
    """After these optimizer steps: prune, insert quantizers, freeze them; then save a checkpoint."""

    def __init__(self, save_at: int = 0, path: Path | None = None) -> None:
        self.save_at, self.path = save_at, path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.edit(EDITS.get(trainer.global_step, []))
        if trainer.global_step == FREEZE_AT:
            freeze_scales(pl_module.student)
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)


def loader(batches: list[Batch] | None = None) -> DataLoader:
    """Ready-made batches, in order."""
    return DataLoader([tiny_batch()] if batches is None else batches, batch_size=None)  # type: ignore[arg-type]


def tiny_trainer(folder: Path, steps: int = 6, **settings: Any) -> Trainer:
    """Quiet, on the CPU, without files of its own."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "default_root_dir": folder,
            "num_sanity_val_steps": 0,
            **quiet,
            **settings,
        }
    )
