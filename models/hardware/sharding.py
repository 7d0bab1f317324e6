"""FSDP2: student and teacher spread over processes, each holding a share of every tensor (`torch.distributed.fsdp.fully_shard`).

Every decoder layer is one group, gathered just before it computes and let go right after.  Embedding, last norm and head are
the root group, gathered with the first call of a step and kept until the end of the backward pass: head and embedding may be one
tensor, and losses read the head's weight.  All processes must make the same calls in the same order.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from models.architecture import decoder_layers

Result = TypeVar("Result")
_ENTRY = "_call_gathered"


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Spread a model over the processes of a mesh, in place; all of them hold the same weights before."""
    weights: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    frame = copy.deepcopy(model, weights)  # all but the weights: sharded modules can't be copied
    for layer in decoder_layers(model):
        fully_shard(model.get_submodule(f"model.layers.{layer.index}"), mesh=mesh)
    fully_shard(model, mesh=mesh)
    # The root's weights are gathered by calls of registered methods only, and nobody here calls `forward`.
    setattr(model, _ENTRY, lambda function, *args: function(*args))
    register_fsdp_forward_method(model, _ENTRY)
    object.__setattr__(model, "_frame", frame)  # no submodule: it must not be in any state_dict


def check_shardable(callbacks: Sequence[object]) -> None:
    """Raise `ValueError` for callbacks that have `needs_whole_student`: they copy, cut or rewrite it on one process alone."""
    found = [type(callback).__name__ for callback in callbacks if getattr(callback, "needs_whole_student", False)]
    if found:
        raise ValueError(
            f"expected a sharded run without callbacks that need the whole student, found {', '.join(found)}; leave them out, and "
            "prune or quantize on one device, or export with `python -m export` afterwards"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is spread over processes."""
    return isinstance(model, FSDPModule)


def call_gathered(model: nn.Module, function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, which uses parts of the model, with the root's weights gathered if it is sharded."""
    return getattr(model, _ENTRY)(function, *args) if is_sharded(model) else function(*args)


@torch.no_grad()
def whole_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a sharded model with all of its weights, in `dtype`; every process must ask for it at the same time."""
    frame: PreTrainedModel = model._frame  # type: ignore[assignment]
    model.reshard()  # type: ignore[operator]  # the root stays gathered after a call without a backward pass
    whole: dict[int, Any] = {}
    for (name, parameter), empty in zip(model.named_parameters(), frame.parameters(), strict=True):
        assert isinstance(parameter, DTensor), name
        whole[id(empty)] = nn.Parameter(parameter.full_tensor().to(dtype), requires_grad=False)
    return copy.deepcopy(frame, whole).to(parameter.device)  # type: ignore[arg-type]  # buffers
