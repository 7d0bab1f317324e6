"""Copies of a model: on the same tensors, with weights rounded once and for all, or whole and ready for generation."""

import copy
import itertools
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from models.hardware.sharding import is_sharded, whole_copy
from models.quantization import quantized_linears
from models.structure.adapters import merge_adapters


def shared_copy(model: PreTrainedModel, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """A second model on the same tensors: its modules can be changed and exchanged, and `model` stays as it is.

    Without a config of its own, it has a copy of the model's.
    """
    kept: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    if config is not None:
        kept[id(model.config)] = config
    return copy.deepcopy(model, kept)


@torch.no_grad()
def with_rounded_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model in evaluation mode that rounds no weight any more: quantized ones are stored as they round; others are shared."""
    rounded = shared_copy(model).eval()
    for linear in quantized_linears(rounded).values():
        weight = linear.weight_quantizer(linear.weight)
        if not torch.equal(weight, linear.weight):  # on its grid already, after calibration
            linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.weight_quantizer = nn.Identity()  # type: ignore[assignment]
    return rounded


@torch.no_grad()
def inference_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a model for generation: evaluation mode, weights in `dtype`, fake-quantized weights rounded once and for all,
    LoRA adapters merged, no activation checkpoints.  Of a sharded model every process gets the whole copy, and all must ask.

    Only parameters change type.  Buffers keep float32: rotary frequencies in bfloat16 would turn by wrong angles, and
    quantization scales would put values on another grid.
    """
    if is_sharded(model):
        return whole_copy(model, dtype).eval()
    duplicate = merge_adapters(copy.deepcopy(model).eval()).requires_grad_(False)
    duplicate._set_gradient_checkpointing(False)
    for linear in quantized_linears(duplicate).values():
        linear.weight.data = linear.weight_quantizer(linear.weight)
        linear.weight_quantizer = nn.Identity()  # type: ignore[assignment]
    for parameter in duplicate.parameters():
        parameter.data = parameter.data.to(dtype)
    return duplicate
