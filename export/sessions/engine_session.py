"""Running a compiled engine on an NVIDIA GPU, token by token, with torch tensors as its memory.

Letters as in `export/sessions/session.py`.  `EngineSession` has the same `run` as `OnnxSession`; results come back to the CPU, only the
cache stays on the GPU.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.engine.to_tensorrt import Flavour, import_tensorrt
from export.sessions.session import Output, position_ids


def why_not_runnable(flavour: Flavour = "auto") -> str | None:
    """Why this machine can't run engines, or None if it can."""
    if torch.version.cuda is None:
        return (
            "this torch is a CPU build: running an engine needs an NVIDIA GPU with its driver and a CUDA build of torch"
        )
    if not torch.cuda.is_available():
        return "no NVIDIA GPU or driver was found (torch.cuda.is_available() is False)"
    try:
        import_tensorrt(flavour)
    except ModuleNotFoundError as error:
        return str(error)
    return None


class EngineSession:
    """An engine from `build_engine`, ready to run.

    Args:
        path: The engine's file.
        flavour: The package that built it: an engine runs only there.

    Attributes:
        labels: Token by label, of an engine that returns their log-probabilities.

    Raises:
        ValueError: The package refuses the file, for example because it was built for another GPU.
    """

    def __init__(self, path: Path, flavour: Flavour = "auto") -> None:
        self._trt = import_tensorrt(flavour)
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ValueError(
                f"expected an engine that {self._trt.__name__} {self._trt.__version__} runs on this GPU at {path.name}, found "
                "one that it refuses; build it on this machine, with this package and for this compute capability"
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = [self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names]
        self._inputs = [name for name, yes in zip(names, is_input, strict=True) if yes]
        self._outputs = [name for name, yes in zip(names, is_input, strict=True) if not yes]
        self._cache_inputs = [name for name in self._inputs if name.startswith("past_key_values.")]
        self.labels: dict[str, int] = _labels(self._engine.name)
        self._contexts: dict[int, Any] = {}
        self._stream = torch.cuda.Stream()

    def run(self, input_ids_BT: Tensor, attention_mask_BS: Tensor, cache: list[Tensor] | None = None) -> Output:
        """Process T new tokens; see `OnnxSession.run`."""
        feeds = {
            "input_ids": input_ids_BT,
            "attention_mask": attention_mask_BS,
            "position_ids": position_ids(attention_mask_BS, input_ids_BT.shape[1]),
        }
        past = self._empty_cache(len(input_ids_BT)) if cache is None else cache
        feeds |= dict(zip(self._cache_inputs, past, strict=True))
        feeds = {name: feeds[name].to("cuda", self._dtype(name)).contiguous() for name in self._inputs}
        context = self._context(feeds)
        for name, tensor in feeds.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, _address(tensor))
        results = {
            name: torch.empty(tuple(context.get_tensor_shape(name)), dtype=self._dtype(name), device="cuda")
            for name in self._outputs
        }
        for name, tensor in results.items():
            context.set_tensor_address(name, _address(tensor))
        self._stream.wait_stream(torch.cuda.current_stream())
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("the engine stopped with an error, see the messages above")
        self._stream.synchronize()
        present = [results.pop(name.replace("past_key_values", "present")) for name in self._cache_inputs]
        tensors = {name: tensor.cpu() for name, tensor in results.items()}
        return Output(tensors.pop("logits", torch.empty(0)), present, tensors)

    def repeat(self, cache: list[Tensor], batch: int) -> list[Tensor]:
        """The cache of one conversation, for B conversations that begin alike."""
        return [tensor.expand(batch, -1, -1, -1) for tensor in cache]

    def _empty_cache(self, batch: int) -> list[Tensor]:
        shapes = [self._engine.get_tensor_shape(name) for name in self._cache_inputs]
        dtype = self._dtype(self._cache_inputs[0])
        return [torch.empty(batch, shape[1], 0, shape[3], dtype=dtype, device="cuda") for shape in shapes]

    def _dtype(self, name: str) -> torch.dtype:
        types = self._trt.DataType
        known = {
            types.FLOAT: torch.float32,
            types.HALF: torch.float16,
            types.FP8: torch.float8_e4m3fn,
            types.INT8: torch.int8,
            types.INT64: torch.int64,
            types.INT32: torch.int32,
        }
        return known[self._engine.get_tensor_dtype(name)]

    def _context(self, feeds: dict[str, Tensor]) -> Any:
        """An execution context on the last, most special optimization profile that takes these sizes."""
        profiles = reversed(range(self._engine.num_optimization_profiles))
        profile = next((index for index in profiles if self._fits(feeds, index)), None)
        if profile is None:
            sizes = {name: tuple(feeds[name].shape) for name in ("input_ids", "attention_mask")}
            raise ValueError(
                f"expected sizes within the engine's optimization profiles, found {sizes}; "
                "build it with larger --batch, --sequence or --past"
            )
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            context.set_optimization_profile_async(profile, self._stream.cuda_stream)
            self._contexts[profile] = context
        return self._contexts[profile]

    def _fits(self, feeds: dict[str, Tensor], profile: int) -> bool:
        ranges = {name: self._engine.get_tensor_profile_shape(name, profile) for name in feeds}
        return all(
            least <= size <= most
            for name, (low, _, high) in ranges.items()
            for least, size, most in zip(low, feeds[name].shape, high, strict=True)
        )


def _labels(name: str) -> dict[str, int]:
    """From the name that `build_engine` gives; others, as of engines of other tools, have no labels."""
    metadata = json.loads(name) if name.startswith("{") else {}
    labels: dict[str, int] = json.loads(metadata.get("labels", "{}"))
    return labels


def _address(tensor: Tensor) -> int:
    """Device address; an empty tensor has none, but TensorRT wants one that is not null."""
    return tensor.data_ptr() or 1 << 8
