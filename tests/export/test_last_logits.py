import onnx_ir as ir
import pytest
import torch
from tiny_models import left_padded_prompts, tiny_model

from export.head_blocks import store_head
from export.last_logits import keep_last_logits
from export.runtime import OnnxSession
from export.skip_norms import norms_with_sums
from export.to_onnx import export_onnx


def check_last_logits(tmp_path):
    """`all.onnx` against the graph that the pass makes of it."""
    model = ir.load(tmp_path / "all.onnx")
    keep_last_logits(model)
    ir.save(model, tmp_path / "last.onnx")  # the weights stay in the first graph's file
    assert not (tmp_path / "last.onnx.data").exists()
    prompts = left_padded_prompts()
    every, last = (
        OnnxSession(tmp_path / name, threads=1).run(prompts["prompt_ids"], prompts["prompt_mask"])
        for name in ("all.onnx", "last.onnx")
    )
    assert last.logits.shape == (3, 1, 128)
    torch.testing.assert_close(last.logits, every.logits[:, -1:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("family", "opset"), [("llama", 21), ("llama", 23), ("gemma2", 23)])
def test_only_the_last_positions_logits_are_computed(family, opset, tmp_path):
    options = {"final_logit_softcapping": 8.0} if family == "gemma2" else {}  # Gemma 2 caps its logits
    export_onnx(tiny_model(family, layers=2, **options), tmp_path / "all.onnx", precision="fp32", opset=opset)
    check_last_logits(tmp_path)


def test_so_they_are_with_a_head_in_blocks_behind_a_fused_norm(graphs, tmp_path):
    model = ir.load(graphs["fp32"])
    assert store_head(model)
    norms_with_sums(model)
    ir.save(model, tmp_path / "all.onnx", external_data="all.onnx.data")
    check_last_logits(tmp_path)


def test_logits_from_elsewhere_are_refused(graphs):
    model = ir.load(graphs["fp32"])
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    softmax = ir.Node("", "Softmax", [logits])
    model.graph.append(softmax)
    model.graph.outputs[0] = softmax.outputs[0]
    logits.name, softmax.outputs[0].name = "scores", "logits"
    with pytest.raises(ValueError, match="expected logits from a matrix product, found Softmax"):
        keep_last_logits(model)
