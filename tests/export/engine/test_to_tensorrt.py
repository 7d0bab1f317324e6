import importlib.util
import sys

import pytest
import torch

from export.engine.to_tensorrt import Profile, build_engine, check_target, import_tensorrt
from export.onnx_graph.to_onnx import check_engine_formats, export_onnx
from export.sessions.engine_session import EngineSession
from export.verify.everything import audit
from export.verify.faithfulness import compare_served, judged_by, sampled, torch_served
from models.structure.edits import apply_edit
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
PROFILES = [Profile((1, 1, 4), (1, 16, 32), (0, 0, 0)), Profile((1, 1, 4), (1, 1, 1), (0, 16, 64))]


@needs_rtx
@pytest.mark.parametrize(("name", "fp8_products"), [("fp8-half", 21), ("fp8", 21), ("fp32", 0), ("fp16", 0)])
def test_engines_build_without_a_gpu(name, fp8_products, graphs, tmp_path):
    engine = build_engine(
        graphs[name],
        tmp_path / "model.engine",
        profiles=PROFILES,
        compute_capabilities=["8.9"],
        flavour="tensorrt_rtx",
    )
    assert engine.path.stat().st_size == engine.bytes > 0
    assert (engine.flavour, engine.compute_capability) == ("tensorrt_rtx", "8.9")
    assert (engine.matrix_multiplies, engine.products.get("FP8 x FP8", 0)) == (22, fp8_products)
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine"]


@needs_rtx
def test_layers_of_different_sizes(tmp_path):
    model = tiny_model("gemma3_text", layers=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    apply_edit(model, {"op": "narrow_mlp", "layer": 0, "keep": list(range(64))})
    apply_edit(model, {"op": "narrow_query_heads", "layer": 1, "keep": [1, 2]})
    export_onnx(quantized(model), tmp_path / "model.onnx", precision="fp8", activations="float16")
    engine = build_engine(
        tmp_path / "model.onnx",
        tmp_path / "model.engine",
        profiles=PROFILES,
        compute_capabilities=["8.9"],
        flavour="tensorrt_rtx",
    )
    assert (engine.matrix_multiplies, engine.products["FP8 x FP8"]) == (15, 14)


@needs_rtx
@pytest.mark.parametrize(
    ("format", "product", "head"),
    [
        ("int8_static", "INT8 x INT8", None),
        ("int8_weight_only", "HALF x INT8", None),
        ("int4_g64", "HALF x INT4", "int4_g64"),
    ],
)
def test_other_formats_build_and_the_audit_counts_their_products(format, product, head, tmp_path):
    model = quantized(tiny_model(layers=1, hidden_size=128, intermediate_size=256), format=format, head=head)
    export_onnx(model, tmp_path / "model.onnx", precision=format, activations="float16")
    engine = build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", profiles=PROFILES, flavour="tensorrt_rtx")
    assert engine.products[product] == (7 if head is None else 8)
    assert audit(model, engine.products, format).status == "passed"


def test_a_product_that_is_not_quantized_fails_the_audit(quantized_model):
    assert audit(quantized_model, {"FP8 x FP8": 21, "HALF x HALF": 1}, "fp8").status == "passed"
    check = audit(quantized_model, {"FP8 x FP8": 20, "HALF x HALF": 2}, "fp8")
    assert (check.status, check.reason) == ("failed", "expected 21 FP8 x FP8, found 20")


def test_formats_that_no_engine_has():
    with pytest.raises(ValueError, match=r"calibrated or no input scales .* found int8, which finds a scale for each"):
        check_engine_formats(["int8"])
    with pytest.raises(ValueError, match=r"symmetric format for an engine, found int4_g32_zp, .* choose int4_g32,"):
        check_engine_formats(["int4_g32_zp"])


@needs_rtx
def test_targets_that_can_not_run_the_engine(graphs, tmp_path):
    with pytest.raises(ValueError, match=r"at least 8\.9 for an FP8 engine, found 8\.6"):
        build_engine(graphs["fp8-half"], tmp_path / "model.engine", compute_capabilities=["8.6"])
    with pytest.raises(ValueError, match=r"supports \(.*8\.9.*\), found 5\.0"):
        build_engine(graphs["fp16"], tmp_path / "model.engine", compute_capabilities=["5.0"], flavour="tensorrt_rtx")
    with pytest.raises(ValueError, match=r"at least 8\.9 for an FP8 engine, found 8\.0"):
        check_target("fp8_e4m3", ["8.0"])
    with pytest.raises(ValueError, match=r"such as 8\.9, found 'sm89'"):
        check_target("fp16", ["sm89"])
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_a_graph_that_tensorrt_can_not_read_is_refused_with_its_reason(tmp_path, graphs):
    (tmp_path / "model.onnx").write_bytes(graphs["fp32"].read_bytes())  # without its weights
    with pytest.raises(ValueError, match=r"to read model\.onnx, found: "):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", flavour="tensorrt_rtx")


def test_tensorrt_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e \.\[tensorrt-rtx\]"):
        import_tensorrt("auto")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["fp8-half", "fp16"])
def test_engines_follow_torch(name, graphs, plain_model, quantized_model, tmp_path):
    model = quantized_model if name.startswith("fp8") else plain_model
    prompts = left_padded_prompts()
    build_engine(graphs[name], tmp_path / "model.engine", profiles=PROFILES)
    held_out = judged_by(model, sampled(model, prompts, 1024))
    reference = torch_served(model, held_out, lambda: None)
    found = held_out.measure(EngineSession(tmp_path / "model.engine"), [2], lambda: None)
    check = compare_served(name, model, found, reference)
    assert check.status == "passed", check.reason
