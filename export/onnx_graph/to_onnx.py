"""A causal language model as an ONNX file with its key/value cache in and out, in floating point or quantized.

| precision           | weights of the decoder's linear layers        | between the matrix products                     |
|---------------------|-----------------------------------------------|-------------------------------------------------|
| `fp32`              | float32                                       | float32                                         |
| `fp16`              | float16                                       | float16 (norms, rotary angles inside: float32)  |
| a format, see       | FLOAT8E4M3FN, INT8 or INT4, with the scales   | float32, or float16 for a strongly typed engine |
| `models/            | of training or calibration; `fp8` is short    |                                                 |
| quantization/       | for `fp8_e4m3`, `mixed` stands for several    |                                                 |
| formats.py`         | formats in one model                          |                                                 |

Names follow Optimum: inputs `input_ids` (B, T), `attention_mask` (B, P + T), `position_ids` (B, T) and
`past_key_values.{layer}.key|value` (B, groups, P, head width); outputs `logits` (B, T, vocabulary) and `present.{layer}.key|value`
(B, groups, P + T, head width).  Batch B, new tokens T and past tokens P are dynamic; P may be 0.  The cache has the type of what
lies between the products, or codes of 8 bits if the model rounds keys and values (`models/quantization/cache.py`).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import onnx
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from export.onnx_graph.bind_weights import bind_weights
from export.onnx_graph.repeat_layers import repeat_layers
from export.onnx_graph.trace import OPSETS, Trace, trace
from models.architecture import decoder_layers
from models.quantization.cache import cache_format, cache_quantizers
from models.quantization.formats import FORMATS, FormatName, format_of
from models.quantization.linear import FakeQuantizedLinear, quantized_linears
from program.files import folder_bytes, move_into_place, staging_folder

Precision = Literal["fp32", "fp16", "fp8", "mixed", FormatName]
UNQUANTIZED = ("fp32", "fp16")
PRECISIONS: tuple[str, ...] = (*UNQUANTIZED, "fp8", "mixed", *FORMATS)
_CPU_OPSET = 23  # the first with fused attention


@dataclass(frozen=True)
class OnnxExport:
    """What was written: the graph's file, the file of its weights, and the bytes of both together."""

    path: Path
    data_path: Path
    bytes: int
    precision: Precision


def export_onnx(
    model: PreTrainedModel,
    path: Path,
    *,
    precision: Precision,
    opset: int = 23,
    activations: Literal["float32", "float16"] = "float32",
) -> OnnxExport:
    """Write `path` and, beside it, `path` + `.data` with the weights.

    Args:
        model: Causal language model of a supported family; it is not changed.
        path: File to write, normally `model.onnx`; an existing one is replaced at the very end.
        precision: A format needs frozen fake quantizers of that format, `fp32` and `fp16` a model without any.
        opset: ONNX operator set: 21, 22 or 23; 23 has fused attention, RMS normalization and rotary embedding.
        activations: Type between the matrix products of a quantized graph.

    Raises:
        ValueError: The precision does not fit the model, or the opset is none of these.
    """
    check_exportable(model, precision=precision, opset=opset)
    half = precision == "fp16" or (precision not in UNQUANTIZED and activations == "float16")
    if half:
        check_half(formats_of(model))
    traced = trace(model, dtype=torch.float16 if half else torch.float32, opset=opset)
    onnx_model = build(traced, model)
    onnx_model.metadata_props.update(_metadata(model, precision=precision, opset=opset, half=half))
    return _save(onnx_model, path, precision)


def build(traced: Trace, model: PreTrainedModel) -> ir.Model:
    """The full graph of a model from its trace."""
    onnx_model = repeat_layers(traced)
    bind_weights(onnx_model, model)
    return onnx_model


def rope_types(model: PreTrainedModel) -> set[str | None]:
    """How rotary angles go with positions, in one way or another for each kind of attention."""
    rotary = model.config.rope_parameters
    return {part.get("rope_type") for part in (rotary, *rotary.values()) if isinstance(part, dict)}


def check_exportable(model: PreTrainedModel, *, precision: Precision, opset: int) -> None:
    """Raise `ValueError` if this model can't be written in this precision and opset."""
    decoder_layers(model)  # refuses unknown families
    if "dynamic" in rope_types(model):
        raise ValueError(
            "expected rotary angles that a graph can hold, found rope_type 'dynamic', whose angles change with the longest prompt "
            "that was ever seen; export a model with another rope_type (default, linear, llama3, yarn or longrope)"
        )
    if opset not in OPSETS:
        raise ValueError(f"expected an ONNX opset among {', '.join(map(str, OPSETS))}, found {opset}; choose 23")
    observing = [name for name, quantizer in cache_quantizers(model).items() if not quantizer.key.frozen]
    if observing:
        raise ValueError(
            f"expected frozen quantizers of keys and values, found {len(observing)} layers whose still observe, such as {observing[0]}; train "
            "on, or calibrate with `--calibration FILE.jsonl`"
        )
    linears = quantized_linears(model)
    if precision in UNQUANTIZED and linears:
        raise ValueError(
            f"expected a model without quantizers for precision {precision}, found {len(linears)} quantized layers; "
            f"export with precision {precision_of(model)}, or pass `export.folders.student.without_quantizers(model)`"
        )
    if precision not in UNQUANTIZED:
        _check_quantizers(linears, precision)


def precision_of(model: PreTrainedModel) -> Precision:
    """The precision that fits the quantizers of a model: their format, `mixed` for several; `fp32` without any."""
    formats = formats_of(model)
    if len(formats) > 1:
        return "mixed"
    return cast(Precision, formats[0]) if formats else "fp32"


def format_for(precision: Precision) -> FormatName | None:
    """The format that a precision names; None for those that name none."""
    name = "fp8_e4m3" if precision == "fp8" else precision
    return cast(FormatName, name) if name in FORMATS else None


def formats_of(model: PreTrainedModel) -> list[str]:
    """Names of the formats of a model's quantized layers, sorted."""
    return sorted({linear.format for linear in quantized_linears(model).values()})


def check_half(formats: Iterable[str]) -> None:
    """Raise `ValueError` for formats that find their scales live: half precision would round the scales themselves."""
    for name in formats:
        inputs = format_of(name).input
        if inputs is not None and inputs.scales == "row":
            raise ValueError(
                f"expected a format with calibrated or no input scales for a float16 graph or an engine, found {name}, which finds a "
                "scale for each token; choose fp8_e4m3, int8_static or a weight-only format, or leave the engine out"
            )


def check_engine_formats(formats: Iterable[str]) -> None:
    """Raise `ValueError` for formats that no TensorRT engine has."""
    names = list(formats)
    check_half(names)
    for name in names:
        if format_of(name).weight.zero_point:
            raise ValueError(
                f"expected a symmetric format for an engine, found {name}, and TensorRT reads no zero points; choose "
                f"{name.removesuffix('_zp')}, or leave the engine out"
            )


def check_cpu(precision: str, opset: int, kv_cache: str | None = None) -> None:
    """Raise `ValueError` for a precision, an opset or a format of the cache that has no such graph."""
    if precision == "fp16" or precision.startswith("fp8"):
        raise ValueError(
            f"expected float32 or integers for a graph for the CPU, found precision {precision}, for which CPUs have "
            "no products; choose fp32, int8 or a weight-only format, name one for the CPU alone (cpu: int8, "
            "--cpu int8), or leave the graph out"
        )
    if opset < _CPU_OPSET:
        raise ValueError(
            f"expected opset {_CPU_OPSET} for a graph for the CPU, found {opset}, which has no fused attention; choose "
            f"{_CPU_OPSET}, or leave the graph out"
        )
    if kv_cache == "fp8_e4m3":
        raise ValueError(
            "expected a key/value cache in floating point or int8 for a graph for the CPU, found fp8_e4m3, which ONNX "
            "Runtime's attention does not read there; choose int8, or leave the graph out"
        )


def _check_quantizers(linears: Mapping[str, FakeQuantizedLinear], precision: Precision) -> None:
    waiting = sum(not quantizer.frozen for linear in linears.values() for quantizer in linear.quantizers())
    if not linears or waiting:
        found = f"{waiting} that still observe" if linears else "none"
        raise ValueError(
            f"expected a model with frozen {precision} quantizers, found {found}; train with the QuantizationAwareTraining "
            "callback, or calibrate with `--calibration FILE.jsonl`"
        )
    formats = sorted({linear.format for linear in linears.values()})
    if precision != "mixed" and formats != [format_for(precision)]:
        raise ValueError(
            f"expected layers in the format {format_for(precision)} for precision {precision}, found {' and '.join(formats)}; export "
            f"with precision {'mixed' if len(formats) > 1 else formats[0]}"
        )


def _metadata(model: PreTrainedModel, *, precision: Precision, opset: int, half: bool) -> dict[str, str]:
    layers = [[layer.num_neurons, layer.num_query_heads, layer.num_kv_groups] for layer in decoder_layers(model)]
    structure = {
        "hidden_size": model.config.hidden_size,
        "vocab_size": model.config.vocab_size,
        "head_dim": decoder_layers(model)[0].head_dim,
        "layers (neurons, query heads, key/value groups)": layers,
    }
    return {
        "producer": "potstill",
        "precision": precision,
        "activations": "float16" if half else "float32",
        "cache": cache_format(model) or ("float16" if half else "float32"),
        "model_type": model.config.model_type,
        "structure": json.dumps(structure),
        "opset": str(opset),
        "positions": str(getattr(model.config, "max_position_embeddings", None) or 0),
    }


def _save(onnx_model: ir.Model, path: Path, precision: Precision) -> OnnxExport:
    data_path = path.with_name(path.name + ".data")
    with staging_folder(path.parent) as folder:
        ir.save(onnx_model, folder / path.name, external_data=data_path.name)
        (folder / data_path.name).touch()  # a model of very small tensors keeps them all inside
        onnx.checker.check_model(str(folder / path.name))
        move_into_place(folder / data_path.name, data_path)
        move_into_place(folder / path.name, path)
    return OnnxExport(path, data_path, folder_bytes(path) + folder_bytes(data_path), precision)
