"""Angles as tables: those of the graph, and none where they depend on the length."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export.cpu_graph.attention_inputs import angle_tables
from export.cpu_graph.cached_attention import cache_in_attention
from export.onnx_graph.to_onnx import export_onnx
from tests.export.onnx_graph.test_families import LONG_ROPE
from tests.helpers.tiny_models import tiny_model


def angles_of(graph):
    cos, sin = (next(node for node in graph if node.op_type == op).outputs[0] for op in ("Cos", "Sin"))
    return cos, sin


def test_tables_hold_the_models_own_angles(tmp_path):
    model = tiny_model(max_position_embeddings=64)
    export_onnx(model, tmp_path / "model.onnx", precision="fp32")
    graph = ir.load(tmp_path / "model.onnx").graph
    cos, sin = angles_of(graph)
    tables = angle_tables(graph, cos, sin, 64)
    expected = model.model.rotary_emb(torch.empty(0), torch.arange(64)[None])
    for table, angle in zip(tables, expected, strict=True):
        assert table.shape == (64, 8)
        np.testing.assert_allclose(table, angle[0, :, :8], rtol=0, atol=1e-6)


def test_angles_that_change_with_the_length_stay_in_the_graph(tmp_path):
    export_onnx(tiny_model("phi3", **LONG_ROPE), tmp_path / "model.onnx", precision="fp32")
    model = ir.load(tmp_path / "model.onnx")
    cos, sin = angles_of(model.graph)
    assert angle_tables(model.graph, cos, sin, 48) is None
    cache_in_attention(model)
    assert "Cos" in {node.op_type for node in model.graph}


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "default"}])
def test_scaled_angles_are_scaled_in_the_table(rope, tmp_path):
    model = tiny_model(rope_parameters=rope | {"rope_theta": 1e4}, max_position_embeddings=32)
    export_onnx(model, tmp_path / "model.onnx", precision="fp32")
    graph = ir.load(tmp_path / "model.onnx").graph
    cos, sin = angles_of(graph)
    cosines, _ = angle_tables(graph, cos, sin, 32)
    expected, _ = model.model.rotary_emb(torch.empty(0), torch.arange(32)[None])
    np.testing.assert_allclose(cosines, expected[0, :, :8], rtol=0, atol=1e-6)
