import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from export.cpu_graph.head_blocks import store_head
from export.cpu_graph.to_cpu import norms_with_sums
from export.onnx_graph.last_logits import LOGITS_TO_KEEP, ask_for_logits, keep_last_logits
from export.onnx_graph.to_onnx import export_onnx
from export.sessions.onnx_session import OnnxSession
from tests.helpers.tiny_models import left_padded_prompts, tiny_model


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


def test_who_asks_for_the_last_logits_gets_no_others(graphs, tmp_path):
    model = ir.load(graphs["fp32"])
    ask_for_logits(model)
    ir.save(model, tmp_path / "asked.onnx", external_data="asked.onnx.data")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(tmp_path / "asked.onnx"), options, providers=["CPUExecutionProvider"])
    assert LOGITS_TO_KEEP not in {item.name for item in session.get_inputs()}  # servers need not know of it
    ids = np.arange(3, 14)[None]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(11)[None]}
    feed |= {
        item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
        for item in session.get_inputs()
        if item.name not in feed
    }
    every, *rows = (
        session.run(["logits"], feed | asked)[0]
        for asked in ({}, *({LOGITS_TO_KEEP: np.array([number])} for number in (0, 1, 2, 11)))
    )
    assert every.shape == (1, 11, 128)
    for number, row in zip((11, 1, 2, 11), rows, strict=True):
        assert row.shape[1] == number
        np.testing.assert_allclose(row, every[:, -number:], rtol=1e-5, atol=1e-4)


def test_logits_from_elsewhere_are_refused(graphs):
    model = ir.load(graphs["fp32"])
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    softmax = ir.Node("", "Softmax", [logits])
    model.graph.append(softmax)
    model.graph.outputs[0] = softmax.outputs[0]
    logits.name, softmax.outputs[0].name = "scores", "logits"
    with pytest.raises(ValueError, match="expected logits from a matrix product, found Softmax"):
        keep_last_logits(model)
