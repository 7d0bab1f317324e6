"""One pruning event: choose the units, cut them on every device, repair what is left, and measure each step."""

import copy
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from lightning import Trainer
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from callbacks.pruning.judge import PruningJudge
from callbacks.shared.averaging import follow_edits, follow_weights
from callbacks.shared.distributed import rebuild_ddp_wrapper, share_of_rank
from datamodules.collate import Batch
from models.architecture import count_parameters, decoder_layers
from models.pruning.cut import PruningSettings, Targets, plan_cut, repair_cut
from models.student import StudentModule


# Compiled code would be recompiled for every set of hooks, to read a few batches.
@torch.compiler.set_stance("force_eager")
def cut_student(
    trainer: Trainer,
    module: StudentModule,
    batches: Sequence[Batch],
    targets: Targets,
    settings: PruningSettings,
    judge: PruningJudge,
) -> dict[str, float]:
    """Bring the student to its targets; all devices end with rank 0's edits and weights.

    Only between optimizer steps: gradients are dropped.  Optimizer states stay with the weights that stay.  A repair
    that takes the student farther from its teacher is undone: from few calibration tokens it can fit noise.

    The calibration `batches` are those of all devices.  The judge measures before and after cut and repair.

    Returns:
        `kl_before`, `kl_after_cut`, `kl_after_repair` (`loss_...` without a teacher), `repair_undone`, and `sizes_of`.
    """
    measure, figures = judge.measure(module), {}

    def measured(moment: str) -> None:
        if judge.num_batches:
            figures[f"{measure}_{moment}"] = judge(trainer, module)

    def total(x: Tensor) -> Tensor:
        return trainer.strategy.reduce(x, reduce_op="sum")  # type: ignore[return-value]

    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
    share = [move_data_to_device(batch, module.device) for batch in share_of_rank(trainer, batches, len(batches))]
    measured("before")
    with _autocast(module):
        edits = trainer.strategy.broadcast(plan_cut(module.student, share, targets, settings, total=total))
    repairs = bool(edits) and settings.repair != "none"
    dense = copy.deepcopy(module.student).requires_grad_(False).eval() if repairs else None
    module.edit(edits)
    follow_edits(trainer, module)
    measured("after_cut")
    if dense is not None:
        unrepaired = _projection_weights(module)
        with _autocast(module):
            repair_cut(module.student, dense, edits, share, settings, total=total)
        rebuild_ddp_wrapper(trainer.strategy)
        measured("after_repair")
        if judge.num_batches and figures[f"{measure}_after_repair"] > figures[f"{measure}_after_cut"]:
            module.student.load_state_dict(unrepaired, strict=False)
            figures["repair_undone"] = 1.0
        else:
            follow_weights(trainer, module, unrepaired)
    elif edits:
        rebuild_ddp_wrapper(trainer.strategy)
    return figures | sizes_of(module)


def in_words(figures: Mapping[str, float], measure: str) -> str:
    """What `cut_student` returned, as a part of a sentence; `measure` is the judge's."""
    of_judge = [key for key in figures if key.startswith(measure)]
    moments = [f"{figures[key]:.4g} {key.removeprefix(measure + '_').replace('_', ' ')}" for key in of_judge]
    return (
        f"{figures['parameters']:,} parameters, {figures['layers']} layers of {figures['neurons_per_layer']:g} neurons, "
        f"{figures['query_heads_per_layer']:g} query heads and {figures['kv_groups_per_layer']:g} key/value groups, hidden size "
        f"{figures['hidden_size']}"
        + (f"; {measure} {', '.join(moments)}" if moments else "")
        + (", so the repair was undone" if "repair_undone" in figures else "")
    )


def _autocast(module: StudentModule) -> torch.autocast:
    """With training in half precision, an event's forward passes are in bfloat16: Fisher gradients are not scaled."""
    half = module.inference_dtype != torch.float32
    # Autocast's cache would not see that a repair changes weights.
    return torch.autocast(module.device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def _projection_weights(module: StudentModule) -> dict[str, Tensor]:
    """Copies of the weights that a repair changes, by name."""
    repaired = {
        id(linear.weight) for layer in decoder_layers(module.student) for linear in (layer.o_proj, layer.down_proj)
    }
    return {name: p.detach().clone() for name, p in module.student.named_parameters() if id(p) in repaired}


def sizes_of(module: StudentModule) -> dict[str, float]:
    """The student's sizes; those of its layers as means over the layers."""
    layers = decoder_layers(module.student)
    return {
        "parameters": count_parameters(module.student),
        "layers": len(layers),
        "hidden_size": module.student.config.hidden_size,
        "neurons_per_layer": fmean(layer.num_neurons for layer in layers),
        "query_heads_per_layer": fmean(layer.num_query_heads for layer in layers),
        "kv_groups_per_layer": fmean(layer.num_kv_groups for layer in layers),
    }
