"""Scales that are trained: parameters beside the quantizers, a group of their own in the optimizer, and rounding after each step.

A quantizer whose scale is learned has the scale's logarithm as a parameter (see `models/quantization/lsq.py`) and keeps the scale
itself in its buffer, so whatever reads scales (exports, folders, copies that generate) finds the trained number where it always is.

Scales learn at `SCALE_RATE` times the learning rate of the weights, as theirs is a rate for the logarithm: at 2e-4, AdamW moves a
weight of 0.02 by a hundredth in a step, and its scale by 0.2 %.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from models.quantization.fake_quantize import in_blocks, in_shape_of
from models.quantization.linear import quantized_linears
from models.quantization.lsq import scale_of
from models.quantization.quantizers import FakeQuantizer

SCALE_RATE = 10.0


def learn_scales(model: nn.Module, optimizers: Sequence[Optimizer] = (), *, weights_follow: bool) -> None:
    """Make the scales of all quantized layers' weights and calibrated inputs trainable, in place, and show them to the optimizers.

    With `weights_follow`, weights are multiplied when their scales move, so that their codes stay: for weights that a
    solver has left on the grid, see `lsq.py`.  Optimizers get a group for the scales.

    Raises:
        ValueError: There is no such scale, they are learned already, or a weight that follows is not in float32.
    """
    quantizers = [quantizer for quantizer in _quantizers(model) if quantizer.has_own_scales]
    if not quantizers or any(quantizer.log_scale is not None for quantizer in quantizers):
        raise ValueError(
            f"expected quantized layers whose scales are not learned yet, found {len(quantizers)} scales of weights and inputs"
            f"{', which are learned already' if quantizers else ''}; learn scales once, after the layers are quantized"
        )
    linears = quantized_linears(model).values()
    if weights_follow:
        check_can_follow(linear.weight for linear in linears)
    for quantizer in quantizers:
        quantizer.learn_scale()
    for linear in linears:
        linear.weight_quantizer.followed = weights_follow
    for optimizer in optimizers:
        add_scale_group(optimizer, learned_scales(model))


def check_can_follow(weights: Iterable[Tensor]) -> None:
    """Raise `ValueError` for weights that are not in float32: a step of a scale is lost in the rounding of others."""
    if others := {weight.dtype for weight in weights} - {torch.float32}:
        raise ValueError(
            f"expected float32 weights to follow scales that are learned, found {', '.join(sorted(map(str, others)))}, which is "
            "coarser than a step of a scale; set model.student_dtype to float32, or learn_scales to false"
        )


def learned_scales(model: nn.Module) -> list[nn.Parameter]:
    """The parameters behind learned scales, in the order of the layers; empty where none are learned."""
    return [quantizer.log_scale for quantizer in _quantizers(model) if quantizer.log_scale is not None]


@torch.no_grad()
def round_learned_scales(model: nn.Module) -> None:
    """After the optimizer has moved the parameters: put the scales to compute with into the quantizers' buffers; weights follow."""
    learning = [
        (linear, quantizer, quantizer.log_scale)
        for linear in quantized_linears(model).values()
        for quantizer in linear.quantizers()
        if quantizer.log_scale is not None
    ]
    if not learning:
        return
    scales = scale_of(torch.cat([log_scale.flatten() for _, _, log_scale in learning]))
    for (linear, quantizer, _), scale in zip(
        learning, scales.split([log_scale.numel() for _, _, log_scale in learning]), strict=True
    ):
        scale = scale.view_as(quantizer.scale)
        if quantizer.followed:
            linear.weight.copy_(_multiplied(linear.weight, scale / quantizer.scale, quantizer.grid.group_size))
        quantizer.scale.copy_(scale)


def add_scale_group(optimizer: Optimizer, scales: Sequence[nn.Parameter]) -> None:
    """Train scales at `SCALE_RATE` times the rates of the optimizer's first group, with its settings, but without weight decay."""
    settings = {key: _own(value) for key, value in optimizer.param_groups[0].items() if not key.startswith("param")}
    for rate in settings.keys() & {"lr", "initial_lr"}:
        settings[rate] = settings[rate] * SCALE_RATE
    if "weight_decay" in settings:
        settings["weight_decay"] = 0.0
    optimizer.add_param_group({**settings, "params": list(scales)})


def cover_new_groups(scheduler: LRScheduler) -> None:
    """Give the optimizer's groups that a schedule does not know the course of its first one.

    Raises:
        ValueError: There are such groups, and the schedule is none of `get_scheduler`'s.
    """
    new = range(len(scheduler.base_lrs), len(scheduler.optimizer.param_groups))
    if not new:
        return
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"expected a learning rate schedule by LambdaLR, as of model.lr_schedule, for learned scales, found "
            f"{type(scheduler).__name__}; set QuantizationAwareTraining.learn_scales to false"
        )
    for group in scheduler.optimizer.param_groups[new.start :]:
        scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])
        scheduler.base_lrs.append(_own(group["initial_lr"]))
        scheduler._last_lr.append(_own(group["lr"]))


def _multiplied(weight_OI: Tensor, factors: Tensor, group_size: int) -> Tensor:
    """A weight times what is shaped like its scales."""
    if group_size:
        return in_shape_of(weight_OI, in_blocks(weight_OI, group_size) * factors.unsqueeze(-1))
    return weight_OI * (factors.unsqueeze(-1) if factors.dim() else factors)


def _quantizers(model: nn.Module) -> Iterator[FakeQuantizer]:
    for linear in quantized_linears(model).values():
        yield from linear.quantizers()


def _own(value: Any) -> Any:
    """A learning rate may be a tensor, which schedules write into."""
    return value.clone() if isinstance(value, torch.Tensor) else value
