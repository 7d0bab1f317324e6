"""What `test_ranks.py` starts: two processes train one student together, and each writes down what it has.

`python -m tests.helpers.two_ranks PLACE`, where PLACE holds `student/`, `teacher/` and `data.jsonl`.
"""

import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import move_data_to_device

from callbacks import GradualPruning, PhaseEvaluation, QuantizationAwareTraining, SampleCompletions, Throughput
from callbacks.pruning import event as pruning_event
from datamodules import Conversations
from models import Distillation
from models.evaluation.answers import evaluate
from models.generation.on_policy import OnPolicy
from models.pruning.cut import plan_cut, repair_cut
from models.quantization import quantized_linears

STEPS, PRUNE_AT, QUANTIZE_AT, FREEZE_AT = 10, (2, 4), 5, 7
SAVE_AT = (3, 6)  # between two pruning events; while quantizers observe
SAVE_LEARNING_AT = 8


class Record(Callback):
    """Weights after every optimizer step, samples, and the largest input this rank showed to each quantizer."""

    def __init__(self, place: Path, save_at: Sequence[int]) -> None:
        self.place, self.save_at = place, save_at
        self.weights: dict[int, torch.Tensor] = {}
        self.samples: dict[int, list[list[int]]] = {}
        self.largest: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        self.samples.setdefault(step, []).append(list(batch["index"]))
        if step in self.weights:
            return  # a micro-batch
        self.weights[step] = torch.cat([p.detach().flatten() for p in pl_module.student.parameters()])
        if step in self.save_at:
            trainer.save_checkpoint(self.place / f"step{step}.ckpt")
        if step == QUANTIZE_AT:
            for name, linear in quantized_linears(pl_module.student).items():
                linear.input_quantizer.register_forward_pre_hook(partial(self._look, name))

    def _look(self, name: str, quantizer: Any, inputs: tuple[torch.Tensor]) -> None:
        if quantizer.training and not quantizer.frozen:
            self.largest[name] = max(self.largest.get(name, 0.0), float(inputs[0].detach().abs().max()))


def plan_differently_on_rank_1(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """The first units on one rank: its own cut would be another one."""
    edits = plan_cut(*args, **kwargs)
    if torch.distributed.get_rank() == 1:
        return [edit | {"keep": list(range(len(edit["keep"])))} for edit in edits]
    assert any(edit["keep"] != list(range(len(edit["keep"]))) for edit in edits)
    return edits


@torch.no_grad()
def repair_differently_on_rank_1(model: Any, *args: Any, **kwargs: Any) -> None:
    """Other weights on one rank, by more than the last bits."""
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    repair_cut(model, *args, **kwargs)
    after = model.model.layers[0].mlp.down_proj.weight
    assert not torch.equal(before, after)
    if torch.distributed.get_rank() == 1:
        after.add_(1.0)


def fit(place: Path, resume_from: int = 0, learn_scales: bool = False) -> dict[str, Any]:
    """One run with everything on; what this rank has in the end."""
    module = Distillation(
        student=str(place / "student"),
        teacher=str(place / "teacher"),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        on_policy=OnPolicy(start=2, share=0.5, tokens=6),
        generate_tokens=3,
    )
    data = Conversations(
        tokenizer=str(place / "student"),
        train=str(place / "data.jsonl"),
        batch_size=2,
        eval_batch_size=3,
        val_fraction=0.25,
        score_exact_match=True,
    )
    save_at = [SAVE_LEARNING_AT] if learn_scales else SAVE_AT
    record = Record(place, [] if resume_from else save_at)
    pruning = GradualPruning(
        0.5,
        0.5,
        start_step=PRUNE_AT[0],
        end_step=PRUNE_AT[1],
        events=2,
        schedule="linear",
        multiple=4,
        calibration_batches=3,
        judge_batches=3,
    )
    phases = PhaseEvaluation(generate_tokens=3, split="val")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=120)),
        max_steps=STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        val_check_interval=8,
        check_val_every_n_epoch=None,
        default_root_dir=place,
        callbacks=[
            pruning,
            phases,
            QuantizationAwareTraining(QUANTIZE_AT, FREEZE_AT - QUANTIZE_AT, learn_scales=learn_scales),
            Throughput(2),
            SampleCompletions(2, 3),
            record,
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data, ckpt_path=str(place / f"step{resume_from}.ckpt") if resume_from else None)
    batches = [move_data_to_device(batch, module.device) for batch in data.val_dataloader()]
    whole = evaluate(
        module.student,
        batches,
        tokenizer=module.tokenizer,
        teacher=module.teacher,
        scorer=lambda texts, batch: data.score(texts, batch, "val") or [],
        max_new_tokens=3,
        dtype=torch.float32,
    )
    return {
        "state": dict(module.state_dict()),
        "edits": module.edits,
        "optimizer": trainer.optimizers[0].state_dict() if trainer.optimizers else None,
        "weights": record.weights,
        "samples": record.samples,
        "largest": record.largest,
        "pruning": pruning.history,
        "phases": phases.phases,
        "teacher": phases.teacher_figures,
        "whole": whole,
        "num_val_batches": len(batches),
        "frozen": [q.input_quantizer.frozen for q in quantized_linears(module.student).values()],
    }


def main() -> None:
    """An uninterrupted run and two that go on from its checkpoints, and a pair of runs with learned scales."""
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    pruning_event.plan_cut = plan_differently_on_rank_1
    pruning_event.repair_cut = repair_differently_on_rank_1
    runs = {name: fit(place, step) for name, step in (("whole", 0), ("between", SAVE_AT[0]), ("observing", SAVE_AT[1]))}
    runs["learning"] = fit(place, learn_scales=True)
    runs["learning, resumed"] = fit(place, SAVE_LEARNING_AT, learn_scales=True)
    torch.save(runs, place / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
