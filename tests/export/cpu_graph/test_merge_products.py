from collections import Counter

import onnx_ir as ir
import pytest
import torch

from export.cpu_graph.merge_products import merge_products
from export.onnx_graph.to_onnx import export_onnx
from export.sessions.onnx_session import OnnxSession
from export.verify import verify
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model

LAYERS = 3


def merged(path, target):
    model = ir.load(path)
    gone = merge_products(model)
    ir.save(model, target, external_data=f"{target.name}.data")
    return gone, Counter(node.op_type for node in model.graph)


def logits(path, **options):
    prompts = left_padded_prompts()
    return OnnxSession(path, threads=1, **options).run(prompts["prompt_ids"], prompts["prompt_mask"]).logits


def test_products_that_read_one_tensor_become_one_and_compute_the_same(graphs, plain_model, tmp_path):
    gone, operators = merged(graphs["fp32"], tmp_path / "model.onnx")
    assert gone == LAYERS * (2 + 1)  # query, key and value; gate and up
    assert operators["MatMul"] == LAYERS * 4 + 1
    assert operators["Split"] == LAYERS * 2
    assert torch.equal(logits(tmp_path / "model.onnx"), logits(graphs["fp32"]))
    prompts = left_padded_prompts()
    checks = verify(plain_model, tmp_path / "model.onnx", prompts["prompt_ids"], prompts["prompt_mask"], decode_steps=4)
    assert [check.status for check in checks] == ["passed"] * len(checks)
    assert (tmp_path / "model.onnx.data").stat().st_size == pytest.approx(
        graphs["fp32"].with_name("model.onnx.data").stat().st_size, rel=0.01
    )


@pytest.mark.parametrize("format", ["int4_g32_zp", "int8_weight_only"])
def test_quantized_weights_are_joined_with_their_scales(format, tmp_path):
    export_onnx(quantized(tiny_model(), format=format), tmp_path / "apart.onnx", precision=format)
    gone, operators = merged(tmp_path / "apart.onnx", tmp_path / "model.onnx")
    assert gone == LAYERS * 3
    assert operators["DequantizeLinear"] == LAYERS * 4
    together, apart = (logits(tmp_path / name, exact=True) for name in ("model.onnx", "apart.onnx"))
    assert torch.equal(together, apart)
    sizes = [(tmp_path / f"{name}.onnx.data").stat().st_size for name in ("model", "apart")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_weights_with_one_scale_each_stay_apart(graphs, tmp_path):
    gone, operators = merged(graphs["fp8"], tmp_path / "model.onnx")
    assert gone == 0
    assert operators["MatMul"] == LAYERS * 7 + 1
