"""Every family in every shape that surgery can give it: ONNX Runtime computes what torch computes, prompts and cache alike."""

import onnx
import pytest
from transformers import PreTrainedModel

from export.onnx_graph.to_onnx import export_onnx
from export.verify import verify
from models.structure.edits import replay
from tests.helpers.tiny import QUIRKS
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model

pytestmark = pytest.mark.long

# 9 to 17 tokens are verified: the frequencies of phi3 change in the middle, and sliding windows of 4 slide.
LONG_ROPE = {
    "original_max_position_embeddings": 12,
    "max_position_embeddings": 48,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.5, 2.0],
        "long_factor": [2.0, 3.0, 5.0, 8.0],
    },
}
CUTS = [
    {"op": "narrow_mlp", "layer": 1, "keep": list(range(0, 96, 3))},
    {"op": "narrow_kv_groups", "layer": 1, "keep": [1]},
    {"op": "narrow_query_heads", "layer": 2, "keep": [0, 3]},
    {"op": "drop_layers", "layers": [0]},
    {"op": "narrow_hidden", "keep": list(range(0, 64, 2))},
]


def model_of(family: str, layers: int) -> PreTrainedModel:
    settings = QUIRKS.get(family, {}) | (LONG_ROPE if family == "phi3" else {})
    return tiny_model(family, layers=layers, **settings)


def check_parity(model, path):
    prompts = left_padded_prompts()
    checks = verify(model, path, prompts["prompt_ids"], prompts["prompt_mask"], decode_steps=8)
    assert [check.status for check in checks] == ["passed"] * len(checks), [check.reason for check in checks]
    return checks


@pytest.mark.parametrize(("family", "opset"), [("gemma2", 21), ("gemma3_text", 21), ("gemma3_text", 22), ("phi3", 21)])
def test_plain(family, opset, tmp_path):
    """In the standard operators of older sets; the newest one is below."""
    model = model_of(family, layers=2)
    export_onnx(model, tmp_path / "model.onnx", precision="fp32", opset=opset)
    check_parity(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    soft_caps = {"gemma2": 2 + 1}  # of each attention and of the logits
    assert sum(node.op_type == "Tanh" for node in graph.node) == soft_caps.get(family, 0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_cut_in_every_direction(family, tmp_path):
    model = model_of(family, layers=3)
    replay(model, CUTS)
    export_onnx(model, tmp_path / "model.onnx", precision="fp32")
    check_parity(model, tmp_path / "model.onnx")


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3"])
def test_quantized_with_float16_between(family, tmp_path):
    model = quantized(model_of(family, layers=2))
    export_onnx(model, tmp_path / "model.onnx", precision="fp8", activations="float16")
    check_parity(model, tmp_path / "model.onnx")


def test_angles_that_a_graph_can_not_hold_are_refused(tmp_path):
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match=r"found rope_type 'dynamic', .*; export a model with another rope_type"):
        export_onnx(model, tmp_path / "model.onnx", precision="fp32")
    assert list(tmp_path.iterdir()) == []
