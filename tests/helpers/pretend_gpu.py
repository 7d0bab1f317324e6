"""A pretend GPU: tensors that compute on the CPU with true numbers, say that they are on cuda:0, and refuse to meet tensors that are not.

    with pretend_gpu() as gpu:
        model.to("cuda")                                         # parameters stay the same objects, ties included
        ids = torch.arange(1, 9, device=model.device)
        model(input_ids=ids[None]).logits.logsumexp(-1).mean().backward()
    gpu.waits                                                    # how often the host waited for the device, by operation

Lightning finds the device by itself, and `torch.autocast("cuda")` is the CPU's.  What real GPUs allow is allowed: a CPU tensor of no
dimension beside others, CPU indices of a GPU tensor.  A wait is what stops the host until the device has caught up: reading a value,
a shape that depends on values, and a copy in either direction that is not asked for as `non_blocking`.

What it cannot show: kernels, speed, memory, and numbers that differ between devices.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.utils import checkpoint
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
_VALUES = {
    "item",
    "tolist",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
    "unique_consecutive",
    "equal",
    "allclose",
    "bincount",
}
_VALUES |= {"is_nonzero", "__bool__", "__int__", "__float__", "__index__", "__contains__", "tensor_split"}
_MAY_MIX = {"to", "cpu", "copy_", "__get__", "__set__", "__getitem__", "__setitem__", "is_same_size", "backward"}
_ALIKE = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}  # of these, not even a scalar may be elsewhere


class PretendGpu:
    """What a test may ask afterwards."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.in_backward = False


_gpu = PretendGpu()  # of the running test


class OnGpu(Tensor):
    """A tensor of the pretend GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check devices, count waits, compute on the CPU, and wrap what comes out."""
        kwargs, name, owner = dict(kwargs or {}), getattr(func, "__name__", str(func)), getattr(func, "__self__", None)
        if owner is Tensor.device:
            return CUDA
        if owner in (Tensor.is_cuda, Tensor.is_cpu):
            return owner is Tensor.is_cuda
        if name in ("numpy", "__array__", "from_dlpack"):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first."
            )
        if name == "get_device":
            return 0
        if (
            name == "_has_compatible_shallow_copy_type"
        ):  # as between a CPU and a real GPU: a module's parameters take new data
            return True
        if name in ("__set__", "set_data") and owner is Tensor.data:
            return _set_data(*args)
        leaves = name == "cpu" or (name == "to" and _names(args[1:], kwargs, "cpu", args))
        _check(name, args, kwargs)
        if (
            leaves
            or _depends_on_values(name, args, kwargs)
            or (name == "copy_" and not isinstance(args[0], OnGpu) and not kwargs.get("non_blocking"))
        ):
            _gpu.waits[name] += 1
        if any(
            is_traceable_wrapper_subclass(value) for value in args
        ):  # which computes by its own rules, on plain tensors
            args = tuple(value.as_subclass(Tensor) if isinstance(value, cls) else value for value in args)
            return tree_map(_on_gpu, func(*args, **kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*tree_map(_really, args), **tree_map(_really, kwargs))
        if leaves:
            return (
                result.clone() if result is args[0] or result.data_ptr() == args[0].data_ptr() else result
            ).as_subclass(Tensor)
        if name == "copy_" and not isinstance(args[0], OnGpu):
            return args[0]
        return tree_map(_on_gpu, result)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy on the same device; parameters stay parameters."""
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                copied = self.detach().as_subclass(Tensor).clone()
            memo[id(self)] = _on_gpu(
                nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as what it is underneath."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)


class GpuParameter(OnGpu, nn.Parameter):
    """A parameter that was moved: the same object as before, as on a real GPU."""


class _Factories(torch.overrides.TorchFunctionMode):
    """`device="cuda"` in factories, and `.to("cuda")` of CPU tensors, give tensors of the pretend GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if name in ("__set__", "set_data") and getattr(func, "__self__", None) is Tensor.data:
            return _set_data(*args)
        from_cpu = bool(args) and isinstance(args[0], Tensor) and not isinstance(args[0], OnGpu)
        if name == "cuda" and from_cpu:
            name, func, args = "to", Tensor.to, (args[0], CUDA)
        moves = name == "to" and from_cpu and _names(args[1:], kwargs, "cuda", args)
        makes = name != "to" and _is_device(kwargs.get("device"), "cuda")
        if not (moves or makes):
            return func(*args, **kwargs)
        blocking = moves and not kwargs.get("non_blocking") and not any(value is True for value in args[1:])
        if blocking or name in ("tensor", "as_tensor"):
            _gpu.waits[f"{name} the GPU"] += 1
        result = func(*tree_map(_really, args), **tree_map(_really, kwargs))
        if is_traceable_wrapper_subclass(result):  # torchao's weights in few bits
            return result
        if moves and result.data_ptr() == args[0].data_ptr():
            result = result.clone() if not result.is_leaf or result.requires_grad else result.detach().clone()
        return _on_gpu(result)


def _is_device(value: Any, kind: str) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith(kind)


def _names(given: Any, kwargs: dict[str, Any], kind: str, args: Any) -> bool:
    """Whether arguments of `Tensor.to` name a device of a kind, or a tensor that is there."""
    for value in [*given, *kwargs.values()]:
        if _is_device(value, kind):
            return True
        if isinstance(value, Tensor) and value is not args[0]:
            return isinstance(value, OnGpu) == (kind == "cuda")
    return False


def _really(value: Any) -> Any:
    return torch.device("cpu") if _is_device(value, "cuda") else value


def _on_gpu(value: Any) -> Any:
    """The same object, on the GPU from now on."""
    if type(value) in (Tensor, nn.Parameter):
        value.__class__ = OnGpu if type(value) is Tensor else GpuParameter
    return value


def _set_data(tensor: Tensor, data: Tensor) -> None:
    """A parameter changes its device and stays the same object."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
        torch.Tensor.data.__set__(tensor, data)  # type: ignore[attr-defined]
    if isinstance(tensor, nn.Parameter):
        tensor.__class__ = GpuParameter if isinstance(data, OnGpu) else nn.Parameter
    else:
        tensor.__class__ = OnGpu if isinstance(data, OnGpu) else Tensor


def _check(name: str, args: Any, kwargs: Any) -> None:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    elsewhere = [t for t in tensors if not isinstance(t, OnGpu) and not is_traceable_wrapper_subclass(t)]
    if not _gpu.in_backward and name in ("__getitem__", "__setitem__") and not isinstance(args[0], OnGpu):
        raise RuntimeError(
            f"indices should be either on cpu or on the same device as the indexed tensor (cpu), in {name}"
        )
    # What autograd has saved comes back as a plain tensor.
    if _gpu.in_backward or name in _MAY_MIX or not any(isinstance(t, OnGpu) for t in tensors):
        return
    if any(tensor.dim() or name in _ALIKE for tensor in elsewhere):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (in {name})"
        )


def _depends_on_values(name: str, args: Any, kwargs: Any) -> bool:
    if name == "repeat_interleave":
        return "output_size" not in kwargs and any(isinstance(value, Tensor) for value in args[1:])
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name in ("__getitem__", "__setitem__"):
        masks = any(isinstance(v, Tensor) and v.dtype == torch.bool for v in tree_flatten(args[1:2])[0])
        return masks and (name == "__getitem__" or (isinstance(args[2], Tensor) and args[2].dim() > 0))
    return name in _VALUES


class _Generator(torch.Generator):
    """`torch.Generator(device="cuda")`, which a build for CPUs does not know."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, device=_really(torch.device(device)))  # type: ignore[call-arg]


@contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """A machine with one GPU, inside the `with` block."""
    global _gpu
    _gpu = PretendGpu()
    enter, enabled, dtype = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype
    group = clip_grad._group_tensors_by_device_and_dtype
    run_backward, again = torch.autograd._engine_run_backward, checkpoint._run_fn_with_dynamo_disabled

    def on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        enter(self, _really(device_type) and "cpu", *args, **kwargs)

    def backward(*args: Any, **kwargs: Any) -> Any:
        """Layers that are computed again, hooks and our own functions run in here: for them, too, there is a GPU."""
        with torch._C._EnableTorchFunction(), _Factories(), mock.patch.object(_gpu, "in_backward", True):
            return run_backward(*args, **kwargs)

    def grouped(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        """By device and type: torch's C++ would say that they are on the CPU."""
        on_gpu = any(isinstance(tensor, OnGpu) for some in tensors for tensor in some)
        groups = group(tensors, *args, **kwargs)
        return {(CUDA if on_gpu else device, kind): of for (device, kind), of in groups.items()}

    with (
        _Factories(),
        mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", grouped),
        mock.patch.object(torch.autograd, "_engine_run_backward", backward),
        mock.patch.object(
            checkpoint, "_run_fn_with_dynamo_disabled", lambda run, *args: again(run, *tree_map(_on_gpu, args))
        ),
        mock.patch.object(torch.autocast, "__init__", on_cpu),
        mock.patch.multiple(
            torch,
            is_autocast_enabled=lambda device="cuda": enabled("cpu"),
            get_autocast_dtype=lambda device: dtype("cpu"),
            Generator=_Generator,
        ),
        mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=lambda x: (tuple(x.shape), x.dtype)),
        mock.patch.multiple(
            torch.cuda,
            current_device=lambda: 0,
            device_count=lambda: 1,
            mem_get_info=lambda device=None: (70 * 2**30, 80 * 2**30),
        ),
        mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"),  # a mode belongs to its thread
        mock.patch.object(CUDAAccelerator, "setup_device"),
    ):
        yield _gpu
