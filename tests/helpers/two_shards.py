"""What `test_sharding.py` starts: `python -m tests.helpers.two_shards PLACE PROCESSES`, where PLACE holds `student/` and `teacher/`.

Both processes see the same batches, so that the mean over them is what one process computes.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from models import Distillation
from models.copies import inference_copy
from models.forward import answer_logits
from models.generation.on_policy import OnPolicy
from tests.helpers.tiny import tiny_batch
from tests.helpers.training import loader

STEPS = 3


class Record(Callback):
    """Losses, and which tensors are spread."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sharded: dict[str, bool] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        pl_module.teacher.model.reshard() if trainer.world_size > 1 else None
        for name, model in (("student", pl_module.student), ("teacher", pl_module.teacher.model)):
            self.sharded[name] = all(isinstance(p, DTensor) for p in model.parameters())


def main(place: Path, processes: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = Distillation(
        teacher=str(place / "teacher"),
        student=str(place / "student"),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        on_policy=OnPolicy(start=STEPS - 1, tokens=4),
        generate_tokens=0,
        gradient_checkpointing=True,
    )
    strategy = ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    record = Record()
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy if processes > 1 else "auto",
        max_steps=STEPS,
        gradient_clip_val=1.0,
        callbacks=[record],
        default_root_dir=place,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader([tiny_batch()] * STEPS), loader())
    trainer.save_checkpoint(place / f"{processes}.ckpt")
    logits = answer_logits(inference_copy(module.student, torch.float32), tiny_batch())
    report = {
        "losses": record.losses,
        "sharded": record.sharded,
        "kl": float(trainer.callback_metrics["val/kl"]),
        "logits": logits.flatten()[:1000].tolist(),
    }
    (place / f"{processes}-{trainer.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
