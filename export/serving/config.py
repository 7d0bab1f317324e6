"""The `config.pbtxt` of one model, built as the message that Triton itself reads it into.

Names, types and sizes of all inputs and outputs are those of the graph.  The first dimension of each is the batch, which Triton
adds itself (`max_batch_size`) so that it may put requests of equal shapes together; -1 stands for every other dynamic one.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from export.engine.to_tensorrt import default_profiles
from export.onnx_graph.metadata import read_graph
from export.sessions.onnx_session import has_fp8

_TYPES: dict[int, str] = {
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT8: "TYPE_INT8",
}
# Triton's backend does not hand `session.disable_quant_qdq` on, see `export/sessions/onnx_session.py`; at this level nothing is fused either.
_BASIC_OPTIMIZATION = -1


@dataclass(frozen=True)
class ServedModel:
    """One model of the repository.

    Attributes:
        suffix: `onnx`, `labels`, `engine` or `labels_engine`.
        files: What to put into the version's folder, by the name it has there.
        graph: Tells inputs and outputs.
    """

    suffix: str
    files: dict[str, Path]
    graph: Path


def model_config(model: ServedModel, name: str, *, max_batch_size: int, threads: int | None = None) -> Any:
    """The configuration as Triton's own message `ModelConfig`; arguments as for `write_triton`.

    Raises:
        ModuleNotFoundError: The package with the schema is not installed.
    """
    schema = _schema()
    graph = read_graph(model.graph)
    config = schema.ModelConfig(name=f"{name}_{model.suffix}", max_batch_size=max_batch_size)
    config.dynamic_batching.SetInParent()
    for tensor in graph.graph.input:
        config.input.add(name=tensor.name, data_type=_data_type(schema, tensor), dims=_dims(tensor))
    for tensor in graph.graph.output:
        config.output.add(name=tensor.name, data_type=_data_type(schema, tensor), dims=_dims(tensor))
    if model.suffix.endswith("engine"):
        config.backend, config.default_model_filename = "tensorrt", "model.plan"
        profiles = [str(index) for index in range(len(default_profiles()))]
        config.instance_group.add(count=1, kind=schema.ModelInstanceGroup.KIND_GPU, profile=profiles)
        return config
    config.backend, config.default_model_filename = "onnxruntime", "model.onnx"
    config.instance_group.add(count=1, kind=schema.ModelInstanceGroup.KIND_CPU)
    if threads is not None:
        config.parameters["intra_op_thread_count"].string_value = str(threads)
    if has_fp8(graph):
        config.optimization.graph.level = _BASIC_OPTIMIZATION
    return config


def _schema() -> Any:
    try:
        return importlib.import_module("tritonclient.grpc.model_config_pb2")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected tritonclient, which has the schema of Triton's configurations, found no module {error.name!r}; run "
            "`pip install -e .[serving]`"
        ) from error


def _data_type(schema: Any, tensor: onnx.ValueInfoProto) -> int:
    type = tensor.type.tensor_type.elem_type
    if type not in _TYPES:
        raise ValueError(
            f"expected tensors of types that Triton passes on, found {tensor.name} of {onnx.TensorProto.DataType.Name(type)}, which its "
            "protocol lacks; export with a key/value cache in int8 or floating point"
        )
    return schema.DataType.Value(_TYPES[type])


def _dims(tensor: onnx.ValueInfoProto) -> list[int]:
    """All dimensions but the batch; a dynamic one has no value in the graph."""
    batch, *others = tensor.type.tensor_type.shape.dim
    if batch.dim_param != "batch":
        raise ValueError(
            f"expected {tensor.name} to begin with the dynamic dimension 'batch', found {batch.dim_param or batch.dim_value}; "
            "export the graph with `python -m export`"
        )
    return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in others]
