"""Products of whole numbers are those of the codes that a graph asks for; what it does not round stays as it is."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export.cpu_graph.integer_products import integer_products
from export.cpu_graph.merge_products import merge_products
from export.cpu_graph.to_cpu import write_cpu_graph
from export.onnx_graph.to_onnx import export_onnx
from export.sessions.onnx_session import OnnxSession
from export.verify import verify
from models.architecture import FAMILIES
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model


@pytest.mark.parametrize("format", ["int8", "int8_static"])
def test_they_are_the_products_that_the_graph_describes(format, tmp_path):
    """Of one layer, so that no rounding decision of one product reaches another but rarely; with padding, and with a cache."""
    export_onnx(quantized(tiny_model(layers=1), format=format), tmp_path / "plain.onnx", precision=format)
    model = ir.load(tmp_path / "plain.onnx")
    merge_products(model)
    assert len(integer_products(model)) == 4
    operators = [node.op_type for node in model.graph]
    assert operators.count("MatMulIntegerToFloat") == 7  # what is split is not made in one piece
    assert operators.count("MatMul") == 1  # the head
    assert "DequantizeLinear" not in operators
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    prompts, next_token = left_padded_prompts(), torch.tensor([[5], [6], [7]])
    mask = torch.cat([prompts["prompt_mask"], torch.ones_like(next_token)], dim=1)
    logits = []
    for name in ("plain.onnx", "model.onnx"):
        session = OnnxSession(tmp_path / name, threads=1, exact=True)
        first = session.run(prompts["prompt_ids"], prompts["prompt_mask"])
        second = session.run(next_token, mask, first.cache)
        logits.append(torch.cat([first.logits[prompts["prompt_mask"].bool()], second.logits[:, 0]]))
    different = ((logits[1] - logits[0]).abs().amax(1) > 1e-5 * logits[0].abs().max()).float().mean()
    assert different <= 0.2


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_products_of_whole_numbers(family, tmp_path):
    """Phi splits a product of its own, by a number of parts."""
    model = quantized(tiny_model(family, layers=2), format="int8")
    export_onnx(model, tmp_path / "model.onnx", precision="int8")
    prompts = left_padded_prompts()
    path = write_cpu_graph(tmp_path / "model.onnx")
    checks = verify(model, path, *prompts.values(), decode_steps=2, for_cpu=True)
    assert {check.status for check in checks} == {"passed"}, [check.reason for check in checks]


@pytest.mark.parametrize("format", ["int8_weight_only", "int8_g32", "fp8_e4m3"])
def test_what_is_not_rounded_to_8_bits_on_both_sides_stays(format, tmp_path):
    export_onnx(quantized(tiny_model(layers=1), format=format), tmp_path / "model.onnx", precision=format)
    model = ir.load(tmp_path / "model.onnx")
    assert integer_products(model) == []
    assert "MatMulIntegerToFloat" not in {node.op_type for node in model.graph}


def test_a_row_of_zeros_stays_zero(tmp_path):
    """Its scale is above zero: a padding token, say, whose embedding is zero."""
    plain = tiny_model(layers=1)
    plain.model.embed_tokens.weight.data[3] = 0
    export_onnx(quantized(plain, format="int8"), tmp_path / "plain.onnx", precision="int8")
    model = ir.load(tmp_path / "plain.onnx")
    integer_products(model)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    ids = torch.full((1, 2), 3)
    logits = OnnxSession(tmp_path / "model.onnx").run(ids, torch.ones_like(ids)).logits
    assert np.isfinite(logits.numpy()).all()
