"""Shrinking a parameter in place: same `Parameter` object, fewer rows or columns, optimizer state included.  Or all of it gone.

Replacing a `Parameter` in the middle of `fit` would leave the optimizer training the old one without any error.  Here the
object stays and only its storage changes, so the optimizer, its step counters and the LR schedule go on as if nothing had
happened.  Valid only between optimizer steps; a graph from before may still be alive (a loss that a logger or `torch.compile` keeps),
but nothing can be propagated through it any more.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@torch.no_grad()
def narrow_parameter(parameter: nn.Parameter, keep: Tensor, dim: int, optimizers: Sequence[Optimizer] = ()) -> None:
    """Keep the given indices of one dimension of a parameter and of its optimizer state; the gradient is dropped.

    `keep` (kept,) is ascending int64.  Of an optimizer's state every tensor of the parameter's own shape (Adam's
    moments, momentum) is sliced alike; scalars (step counters) are left alone.
    """
    old_shape = parameter.shape
    keep = keep.to(parameter.device)
    kept = parameter.data.index_select(dim, keep)
    # autograd's node for a parameter remembers its shape for as long as any graph holds the node; a change of type rebuilds it
    parameter.data = kept.new_empty(0, dtype=torch.float32 if kept.dtype == torch.float16 else torch.float16)
    parameter.data = kept
    parameter.grad = None
    for optimizer in optimizers:
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == old_shape:
                optimizer.state[parameter][name] = _narrow_state(optimizer, parameter, value, dim, keep)


def _narrow_state(optimizer: Optimizer, parameter: nn.Parameter, value: Tensor, dim: int, keep: Tensor) -> Tensor:
    if not is_traceable_wrapper_subclass(value):
        return value.index_select(dim, keep.to(value.device))
    # torchao's low-bit states share a scale among neighbours, which slicing separates: quantize again, in a buffer that the
    # optimizer itself makes for the parameter's new shape.
    if not hasattr(optimizer, "_new_buffer"):
        raise ValueError(
            f"expected optimizer states that are plain tensors or torchao's for pruning during fit, found "
            f"{type(value).__name__} of {type(optimizer).__name__}; choose another optimizer"
        )
    kept = value.dequantize().index_select(dim, keep.to(value.device))
    return optimizer._new_buffer(parameter, getattr(value, "signed", True)).copy_(kept)


def narrow_linear(linear: Any, keep: Tensor, dim: int, optimizers: Sequence[Optimizer] = ()) -> None:
    """Keep the given outputs (dim 0) or inputs (dim 1) of a linear layer; a bias follows its outputs."""
    narrow_parameter(linear.weight, keep, dim, optimizers)
    if dim == 0 and linear.bias is not None:
        narrow_parameter(linear.bias, keep, 0, optimizers)
    if isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = linear.weight.shape


def drop_parameters(parameters: Iterable[nn.Parameter], optimizers: Sequence[Optimizer]) -> None:
    """Take parameters and their state out of optimizers; the others stay in their groups, in their order.

    A new optimizer over the remaining parameters then numbers them in the same way, so a checkpoint's state fits.
    """
    gone = {id(parameter): parameter for parameter in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            left = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in gone]
            for key in ("params", "param_names"):  # names are there if the optimizer was given named parameters
                if key in group:
                    group[key] = [group[key][index] for index in left]
        for parameter in gone.values():
            optimizer.state.pop(parameter, None)


def checked_indices(indices: Sequence[int], size: int, what: str) -> Tensor:
    """Indices as a tensor, int64: at least one, ascending, each from 0 to `size` - 1.

    `what` says for the error who chooses what of which: "narrow_mlp to keep neurons of layer 3".

    Raises:
        ValueError: They are not such indices.
    """
    found = list(indices)
    if not found or found != sorted(set(found)) or found[0] < 0 or found[-1] >= size:
        raise ValueError(
            f"expected {what} by 1 to {size} distinct ascending indices below {size}, found {len(found)} with the ends "
            f"{found[:1]} and {found[-1:]}; change them, or choose a lower sparsity"
        )
    return torch.tensor(found, dtype=torch.long)


def group_indices(groups: Tensor, width: int) -> Tensor:
    """Expand group numbers (kept,) to the indices (kept * width,) of their members."""
    return (groups[:, None] * width + torch.arange(width)).flatten()
