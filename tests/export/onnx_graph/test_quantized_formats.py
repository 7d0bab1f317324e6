"""Every quantization format: frozen, exported, and the same numbers in torch and ONNX Runtime."""

from pathlib import Path

import onnx
import pytest

from export.onnx_graph.to_onnx import export_onnx, precision_of
from export.verify import verify
from models.quantization import FORMATS
from tests.helpers.tiny_models import VOCAB, left_padded_prompts, quantized, tiny_model

PROMPTS = left_padded_prompts()
TYPES = {"fp8_e4m3": onnx.TensorProto.FLOAT8E4M3FN, "int8": onnx.TensorProto.INT8, "int4": onnx.TensorProto.INT4}


@pytest.mark.parametrize("format", [name for name in FORMATS if "g32" not in name])  # other groups differ in nothing
def test_the_graph_computes_what_torch_computes(format: str, tmp_path: Path) -> None:
    model = quantized(tiny_model(layers=1, intermediate_size=160), format=format)
    assert precision_of(model) == format
    export_onnx(model, tmp_path / "model.onnx", precision=format)
    checks = verify(model, tmp_path / "model.onnx", PROMPTS["prompt_ids"], PROMPTS["prompt_mask"], decode_steps=4)
    assert [check.status for check in checks] == ["passed"] * 3, checks

    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = [tensor for tensor in graph.initializer if tensor.data_type == TYPES[FORMATS[format].weight.numbers]]
    assert len([tensor for tensor in stored if len(tensor.dims) == 2 and ".weight." in tensor.name]) >= 7
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


@pytest.mark.parametrize(
    ("family", "format", "head"), [("llama", "fp8_e4m3", "int4_g32"), ("gemma2", "int4_g32", "int4_g32_zp")]
)
def test_so_does_one_with_a_quantized_head(family: str, format: str, head: str, tmp_path: Path) -> None:
    model = quantized(tiny_model(family, layers=2), format=format, head=head)
    assert precision_of(model) == "mixed"
    export_onnx(model, tmp_path / "model.onnx", precision="mixed")
    checks = verify(model, tmp_path / "model.onnx", PROMPTS["prompt_ids"], PROMPTS["prompt_mask"], decode_steps=4)
    assert {check.status for check in checks} == {"passed"}, checks
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert stored["lm_head.weight.int4.transposed"].data_type == onnx.TensorProto.INT4
    assert tuple(stored["model.embed_tokens.weight"].dims) == (VOCAB, 64)
