"""Tracing a decoder into an ONNX graph, at a cost that does not grow with its depth.

`torch.onnx.export` takes about two seconds a decoder layer, yet the layers of a decoder differ in sizes only.  So the model
that is traced here is a *slice*: one layer of each kind (usually one in all), with everything around the layers.
`export/onnx_graph/repeat_layers.py` then repeats the traced layers to full depth, and `export/onnx_graph/bind_weights.py` fills in the weights.

In the graph that `trace` returns, every parameter and every quantizer scale is a plain graph *input* under its Hugging Face name.
Optimization passes can therefore neither fold weights away nor merge equal ones, and the names stay exact.

Letters: B batch, T new tokens, P past tokens (in the cache), S = P + T, G key/value groups, E head width, V vocabulary.
"""

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import opset21
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from export.onnx_graph.cache_codes import store_codes
from export.onnx_graph.layer_kinds import layer_kinds, slice_layers
from models.architecture import CACHE, decoder_layers
from models.quantization.linear import FakeQuantizer

OPSETS = (21, 22, 23)
CODES = {"fp8_e4m3": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8, "int4": ir.DataType.INT4}
_WRAPPER_PREFIX = "decoder."


class DecoderWithCache(nn.Module):
    """A causal language model as a function of plain tensors: tokens and cache in, logits and cache out.

    The four-dimensional mask is built here: a token sees the unmasked tokens up to itself, and always itself.  Rows at padding
    positions then stay finite in every runtime (their values mean nothing and are masked wherever they could be seen).
    Attention with a soft cap (Gemma 2), which transformers computes operator by operator, adds its mask to the scores;
    fused attention takes it as booleans.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder
        self.window = getattr(decoder.config, "sliding_window", None)
        self.layer_types = getattr(decoder.config, "layer_types", None)
        self.adds_mask = decoder.config._attn_implementation == "eager"

    def forward(
        self, input_ids_BT: Tensor, attention_mask_BS: Tensor, position_ids_BT: Tensor, past_BGPE: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, T, V) and the cache (B, G, S, E), as key, value, key, value, ... of one layer after another."""
        cache = DynamicCache(list(zip(past_BGPE[::2], past_BGPE[1::2], strict=True)))
        mask = self._masks(attention_mask_BS, input_ids_BT.shape[1], past_BGPE[0].shape[2])
        output = self.decoder(
            input_ids=input_ids_BT, attention_mask=mask, position_ids=position_ids_BT, use_cache=True, **{CACHE: cache}
        )
        return output.logits, cache_tensors(cache)

    def _masks(self, attention_mask_BS: Tensor, num_new: int, num_past: int) -> Any:
        query_T1 = torch.arange(num_new, device=attention_mask_BS.device)[:, None] + num_past
        key_1S = torch.arange(attention_mask_BS.shape[1], device=attention_mask_BS.device)[None, :]
        seen_TS = key_1S <= query_T1
        sliding_TS = seen_TS & (key_1S > query_T1 - self.window) if self.window else seen_TS

        def with_padding(seen_TS: Tensor) -> Tensor:
            unmasked = (seen_TS[None, None] & attention_mask_BS.bool()[:, None, None]) | (key_1S == query_T1)[
                None, None
            ]
            return self._added_to_scores(unmasked) if self.adds_mask else unmasked

        if self.layer_types and len(set(self.layer_types)) > 1:
            return {"full_attention": with_padding(seen_TS), "sliding_attention": with_padding(sliding_TS)}
        full = self.layer_types is not None and self.layer_types[0] == "full_attention"
        return with_padding(seen_TS if full else sliding_TS)

    def _added_to_scores(self, unmasked_B1TS: Tensor) -> Tensor:
        dtype = self.decoder.dtype
        lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype)
        return torch.where(unmasked_B1TS, torch.zeros((), dtype=dtype), lowest)


@dataclass
class Trace:
    """The traced slice of a model.

    Attributes:
        model: ONNX graph of the slice; its inputs are `cache_io` names for the data, then parameters and scales by name.
        slots: For every layer of the full model, the position of its kind among the slice's layers.
        num_slots: Number of layers in the slice.
    """

    model: ir.Model
    slots: list[int]
    num_slots: int


def cache_tensors(cache: Any) -> list[Tensor]:
    """The tensors of a `DynamicCache`: key, value, key, value, ... of one layer after another."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """`prefix.0.key`, `prefix.0.value`, `prefix.1.key`, ... (the names that Optimum uses)."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]


def trace(model: PreTrainedModel, *, dtype: torch.dtype, opset: int) -> Trace:
    """Trace one layer of each kind, and what lies around the layers.

    Args:
        model: Supported causal language model; it is not changed.
        dtype: Floating point type between the matrix products: `torch.float32` or `torch.float16`.
        opset: ONNX operator set, one of `OPSETS`; 23 has fused attention, RMS normalization and rotary embedding.
    """
    kinds = layer_kinds(model)
    distinct = list(dict.fromkeys(kinds))
    part = slice_layers(model, [kinds.index(kind) for kind in distinct])
    if (part.dtype, part.device.type) != (dtype, "cpu"):
        part = _converted(copy.deepcopy(part).cpu(), dtype)  # type: ignore[call-arg]  # a copy first: `slice_layers` shares tensors
    with _quiet(), torch.no_grad(), _attention_without_repeated_groups(), _without_cached_fakes():
        program = torch.export.export(
            DecoderWithCache(part), _example(part, dtype), dynamic_shapes=_dynamic_shapes(len(distinct)), strict=False
        )
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            custom_translation_table={torch.ops.potstill.fake_quantize.default: _fake_quantize_to_onnx},
        )
        assert exported is not None
        _name_inputs_and_outputs(exported.model.graph, len(distinct))
        _parameters_to_inputs(exported.model.graph)
        exported.optimize()
        _one_type_for_norms(exported.model.graph)
        store_codes(exported.model.graph)
        common_passes.CommonSubexpressionEliminationPass()(exported.model)  # the fusions leave equal nodes behind
    return Trace(exported.model, [distinct.index(kind) for kind in kinds], len(distinct))


def _converted(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Change the type of parameters and scales, in place; other buffers (rotary frequencies) must keep their digits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, FakeQuantizer):  # QuantizeLinear wants a scale of the tensor's own type
            module.scale = module.scale.to(dtype)
    return model


def _fake_quantize_to_onnx(
    x: Any, scale: Any, zero_point: Any = None, numbers: str = "fp8_e4m3", axis: int = 0, block_size: int = 0
) -> Any:
    """`potstill::fake_quantize` as the standard pair, which saturates like the clamp in torch.

    Zero points belong to weights only: `export/onnx_graph/bind_weights.py` stores them with the codes.
    """
    codes = CODES[numbers]
    if len(scale.shape) == 0 and numbers == "fp8_e4m3":  # TensorRT wants to see the zero point
        zero: Any = opset21.Constant(value=ir.serde.to_proto(ir.tensor(0.0, dtype=codes)))
        return opset21.DequantizeLinear(opset21.QuantizeLinear(x, scale, zero), scale, zero)
    layout: dict[str, Any] = {"axis": 1 if block_size else axis, "block_size": block_size}
    return opset21.DequantizeLinear(
        opset21.QuantizeLinear(x, scale, output_dtype=codes.value, **layout), scale, **layout
    )


def _example(model: PreTrainedModel, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Inputs of distinct sizes above one, so that the tracer takes none of them for a constant or for another."""
    batch, new, past = 2, 3, 5
    cache = [
        torch.zeros(batch, layer.num_kv_groups, past, layer.head_dim, dtype=dtype)
        for layer in decoder_layers(model)
        for _ in range(2)
    ]
    mask_BS = torch.ones(batch, past + new, dtype=torch.long)
    positions_BT = torch.arange(past, past + new).repeat(batch, 1)
    return torch.zeros(batch, new, dtype=torch.long), mask_BS, positions_BT, cache


def _dynamic_shapes(num_layers: int) -> Any:
    dynamic = torch.export.Dim.DYNAMIC
    return *[{0: dynamic, 1: dynamic}] * 3, [{0: dynamic, 2: dynamic}] * (2 * num_layers)


def _name_inputs_and_outputs(graph: ir.Graph, num_layers: int) -> None:
    names = ["input_ids", "attention_mask", "position_ids", *cache_names("past_key_values", num_layers)]
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
        last = {"attention_mask": "past_sequence + sequence"}.get(name, "sequence")
        value.shape = ir.Shape(["batch", last]) if "." not in name else _cache_shape(value, "past_sequence")
    for value, name in zip(graph.outputs, ["logits", *cache_names("present", num_layers)], strict=True):
        value.name = name
        assert value.shape is not None
        full = ir.Shape(["batch", "sequence", value.shape[2]])
        value.shape = full if name == "logits" else _cache_shape(value, "past_sequence + sequence")


def _cache_shape(value: ir.Value, length: str) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape(["batch", value.shape[1], length, value.shape[3]])


def _parameters_to_inputs(graph: ir.Graph) -> None:
    """Turn every parameter and scale into a graph input under its Hugging Face name; constants stay as they are."""
    for name, value in list(graph.initializers.items()):
        if name.startswith(_WRAPPER_PREFIX) and name.endswith((".weight", ".bias", ".scale")):
            del graph.initializers[name]
            value.const_value = None
            value.name = name.removeprefix(_WRAPPER_PREFIX)
            graph.inputs.append(value)


def _one_type_for_norms(graph: ir.Graph) -> None:
    """Put back the cast to float32 that fusion takes away in front of a norm with a float32 gain (Gemma, in float16).

    ONNX allows the two types, runtimes do not.
    """
    for norm in list(graph):
        if norm.op_type != "RMSNormalization":
            continue
        x, gain = norm.inputs
        assert x is not None
        assert gain is not None
        assert gain.dtype is not None
        if x.dtype != gain.dtype:
            cast = ir.Node("", "Cast", [x], [ir.AttrInt64("to", gain.dtype)], metadata_props=dict(norm.metadata_props))
            cast.outputs[0].name = f"{x.name}.cast_for.{norm.outputs[0].name}"
            cast.outputs[0].dtype = gain.dtype
            graph.insert_before(norm, cast)
            norm.replace_input_with(0, cast.outputs[0])


@contextlib.contextmanager
def _attention_without_repeated_groups() -> Iterator[None]:
    """Let attention take grouped keys as they are, instead of repeating them in memory for every query head."""
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _without_cached_fakes() -> contextlib.AbstractContextManager[Any]:
    """Compute every fake tensor: with dynamic shapes, torch's cache of them costs a sixth of the tracing and saves nothing."""
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about optional packages off the screen; its errors are exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        finally:
            logger.setLevel(level)
