"""Running an exported graph token by token in ONNX Runtime on the CPU.

Left alone, ONNX Runtime turns a DequantizeLinear of blocks and the product behind it into one operator (MatMulNBits) that reads 4 or 8
bits a weight and rounds its input to 8 bits, block by block: fast, and a little less exact than the graph says.  An `exact` session
computes what is written.

Letters: B batch, T new tokens, P past tokens, S = P + T, G key/value groups, E head width, V vocabulary.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime import OrtValue
from torch import Tensor

from export.onnx_graph.metadata import metadata_of, read_graph
from export.sessions.session import Output, position_ids

_TYPES = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(int8)": onnx.TensorProto.INT8,
    "tensor(float8e4m3fn)": onnx.TensorProto.FLOAT8E4M3FN,
}


class OnnxSession:
    """An ONNX file from `export_onnx`, ready to run on the CPU.

    Args:
        path: The graph; its weights lie beside it.
        threads: Threads of one operator; None: ONNX Runtime's choice.
        graph: A changed version of the graph at `path` to run instead, with the same weights file.
        exact: Whether quantized weights are multiplied in floating point; FP8 graphs always are.
        packed: Whether weights are kept in the order in which products read them, too: a little faster, and most of them twice in memory.

    Attributes:
        labels: Token by label, of a graph that returns their log-probabilities (`export/onnx_graph/labels.py`).
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        graph: onnx.ModelProto | None = None,
        exact: bool = False,
        packed: bool = True,
    ) -> None:
        options = session_options(threads)
        # FP8 pairs would be fused to integer products that do not exist; without this option the session is refused.
        if exact or has_fp8(read_graph(path)):
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        source = str(path) if graph is None else graph.SerializeToString()
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._inputs = {item.name for item in self._session.get_inputs()}
        self._cache_inputs = [item for item in self._session.get_inputs() if item.name.startswith("past_key_values.")]
        self._outputs = [item.name for item in self._session.get_outputs()]
        self.labels: dict[str, int] = json.loads(metadata_of(path).get("labels", "{}"))

    def empty_cache(self, batch: int) -> list[OrtValue]:
        """The cache of B conversations without past tokens."""
        shapes = [(batch, item.shape[1], 0, item.shape[3]) for item in self._cache_inputs]
        types = [_TYPES[item.type] for item in self._cache_inputs]
        return [OrtValue.ortvalue_from_shape_and_type(shape, type) for shape, type in zip(shapes, types, strict=True)]

    def repeat(self, cache: list[OrtValue], batch: int) -> list[OrtValue]:
        """The cache of one conversation, for B conversations that begin alike."""
        repeated = [
            OrtValue.ortvalue_from_shape_and_type([batch, *value.shape()[1:]], value.element_type()) for value in cache
        ]
        for value, one in zip(repeated, cache, strict=True):
            value.update_inplace(np.repeat(one.numpy(), batch, axis=0))
        return repeated

    def run(
        self,
        input_ids_BT: Tensor,
        attention_mask_BS: Tensor,
        cache: list[OrtValue] | None = None,
        others: dict[str, Tensor] | None = None,
    ) -> Output:
        """Process T new tokens.

        Args:
            input_ids_BT: New tokens, int64; left padded in a first call with prompts of different lengths.
            attention_mask_BS: 1 for tokens, 0 for padding, over past and new tokens, int64.
            cache: The cache that the previous call returned; None: no past.
            others: Further inputs of a changed graph.
        """
        batch, num_new = input_ids_BT.shape
        feeds = {"input_ids": _to_ort(input_ids_BT), "attention_mask": _to_ort(attention_mask_BS)}
        if "position_ids" in self._inputs:  # a graph may count positions itself
            feeds["position_ids"] = _to_ort(position_ids(attention_mask_BS, num_new))
        past = self.empty_cache(batch) if cache is None else cache
        feeds |= {item.name: value for item, value in zip(self._cache_inputs, past, strict=True)}
        feeds |= {name: _to_ort(value) for name, value in (others or {}).items()}
        # OrtValues stay inside the runtime: the cache is not copied from call to call.
        results = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, feeds), strict=True))
        present = [results.pop(item.name.replace("past_key_values", "present")) for item in self._cache_inputs]
        tensors = {name: torch.from_numpy(value.numpy()) for name, value in results.items()}
        return Output(tensors.pop("logits", torch.empty(0)), present, tensors)


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """Without the runtime's warnings; threads of one operator, None: its choice."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def has_fp8(model: onnx.ModelProto) -> bool:
    """Whether a graph holds FP8 codes."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer)


def new_entries(cache: list[Any], num_new: int, scales: Sequence[float] = ()) -> list[Tensor]:
    """The last T tokens of a cache, each (B, G, T, E), in floating point; codes have a scale for each tensor."""
    entries = [_tensor(value)[:, :, -num_new:] for value in cache]
    return [entry.float() * scale for entry, scale in zip(entries, scales, strict=True)] if scales else entries


def _tensor(value: OrtValue | Tensor) -> Tensor:
    """A value of the runtime, or of an engine, as a tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    tensor = torch.from_numpy(value.numpy())  # FP8 codes come as bytes
    return tensor.view(torch.float8_e4m3fn) if value.element_type() == onnx.TensorProto.FLOAT8E4M3FN else tensor


def _to_ort(tensor: Tensor) -> OrtValue:
    return OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
