"""Scales that are trained: parameters beside the quantizers, a group of their own in the optimizer, and rounding after each step.

A quantizer whose scale is learned has the scale's logarithm as a parameter (see `models/quantization/lsq.py`) and keeps the scale
itself in its buffer, so whatever reads scales (exports, folders, copies that generate) finds the trained number where it always is.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from models.quantization.linear import quantized_linears
from models.quantization.lsq import scale_of
from models.quantization.quantizers import FakeQuantizer


def learn_scales(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
    """Make the scales of all quantized layers' weights and calibrated inputs trainable, in place, and show them to the optimizers.

    Raises:
        ValueError: There is no such scale, or they are learned already.
    """
    quantizers = [quantizer for quantizer in _quantizers(model) if quantizer.has_own_scales]
    if not quantizers or any(quantizer.log_scale is not None for quantizer in quantizers):
        raise ValueError(
            f"expected quantized layers whose scales are not learned yet, found {len(quantizers)} scales of weights and inputs"
            f"{', which are learned already' if quantizers else ''}; learn scales once, after the layers are quantized"
        )
    for quantizer in quantizers:
        quantizer.learn_scale()
    for optimizer in optimizers:
        add_scale_group(optimizer, learned_scales(model))


def learned_scales(model: nn.Module) -> list[nn.Parameter]:
    """The parameters behind learned scales, in the order of the layers; empty where none are learned."""
    return [quantizer.log_scale for quantizer in _quantizers(model) if quantizer.log_scale is not None]


@torch.no_grad()
def round_learned_scales(model: nn.Module) -> None:
    """After the optimizer has moved the parameters: put the scales to compute with into the quantizers' buffers."""
    learning = [quantizer for quantizer in _quantizers(model) if quantizer.log_scale is not None]
    if not learning:
        return
    scales = scale_of(torch.cat([q.log_scale.flatten() for q in learning if q.log_scale is not None]))
    for quantizer, scale in zip(learning, scales.split([q.scale.numel() for q in learning]), strict=True):
        quantizer.scale.copy_(scale.view_as(quantizer.scale))


def add_scale_group(optimizer: Optimizer, scales: Sequence[nn.Parameter]) -> None:
    """Train scales with the settings of the optimizer's first group as they are now, but without weight decay."""
    settings = {key: _own(value) for key, value in optimizer.param_groups[0].items() if not key.startswith("param")}
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
    for _ in new:
        scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])
        scheduler.base_lrs.append(_own(scheduler.base_lrs[0]))
        scheduler._last_lr.append(_own(scheduler._last_lr[0]))


def _quantizers(model: nn.Module) -> Iterator[FakeQuantizer]:
    for linear in quantized_linears(model).values():
        yield from linear.quantizers()


def _own(value: Any) -> Any:
    """A learning rate may be a tensor, which schedules write into."""
    return value.clone() if isinstance(value, torch.Tensor) else value
