"""`cpu.onnx` computes what `model.onnx` does, with other operators; what has no such graph is refused."""

import onnx
import pytest
import torch

from export.__main__ import main
from export.cpu_graph.to_cpu import write_cpu_graph
from export.folders.student import save_student
from export.layout import CPU
from export.onnx_graph.to_onnx import export_onnx
from export.sessions.onnx_session import OnnxSession
from export.sessions.shared_cache import SharedCacheSession
from export.verify import verify
from models.quantization import FORMATS
from tests.helpers.tiny import tiny_folder
from tests.helpers.tiny_models import VOCAB, left_padded_prompts, quantized, tiny_model, tiny_tokenizer

PROMPTS = left_padded_prompts()
IDS, MASK = PROMPTS["prompt_ids"], PROMPTS["prompt_mask"]


def operators(path):
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def written(model, folder, precision):
    export_onnx(model, folder / "model.onnx", precision=precision)
    return write_cpu_graph(folder / "model.onnx")


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8_static", "int8_weight_only", "int8_g32", "int4_g32"])
def test_it_computes_what_torch_computes(precision, tmp_path):
    model = tiny_model(layers=2) if precision == "fp32" else quantized(tiny_model(layers=2), format=precision)
    path = written(model, tmp_path, precision)
    checks = verify(model, path, IDS, MASK, decode_steps=8, for_cpu=True)
    assert [check.status for check in checks] == ["passed"] * len(checks), [check.reason for check in checks]
    found = operators(path)
    assert found.count("GroupQueryAttention") == 2
    assert found.count("MatMulIntegerToFloat") == (2 * 5 if precision in ("int8", "int8_static") else 0)
    assert (tmp_path / "cpu.onnx.data").stat().st_size > 0
    assert {item.name for item in tmp_path.iterdir()} == {*("model.onnx", "model.onnx.data", CPU, "cpu.onnx.data")}


def test_a_cache_beyond_the_models_positions_is_refused(tmp_path):
    path = written(tiny_model(layers=1, max_position_embeddings=32), tmp_path, "fp32")
    assert SharedCacheSession(path, length=32).run(torch.arange(3, 35)[None]).isfinite().all()
    with pytest.raises(ValueError, match="at most 32 tokens, the positions that the model knows, found 33"):
        SharedCacheSession(path, length=33)


@pytest.mark.parametrize("precision", ["int8", "int8_static"])
def test_whole_numbers_are_those_of_the_graph(precision, tmp_path, monkeypatch):
    """With the head left alone, only the order of summation differs: codes, and so logits, are the same but for rare ties."""
    monkeypatch.setattr("export.cpu_graph.to_cpu.store_head", lambda model: None)
    model = quantized(tiny_model(layers=1), format=precision)
    path = written(model, tmp_path, precision)
    plain, cpu = (
        OnnxSession(p, exact=True).run(IDS, MASK).logits[MASK.bool()] for p in (tmp_path / "model.onnx", path)
    )
    different = ((cpu - plain).abs().amax(1) > 1e-5 * plain.abs().max()).float().mean()
    assert different <= 0.2


@pytest.mark.parametrize("format", ["int4_g32", "int8_g32", "int8_weight_only"])
def test_a_head_that_was_quantized_with_the_student_keeps_its_codes(format, tmp_path):
    model = quantized(tiny_model(layers=1), format=None, head=format)
    path = written(model, tmp_path, format)
    checks = verify(model, path, IDS, MASK, decode_steps=2, for_cpu=True)
    assert {check.status for check in checks} == {"passed"}, checks
    stored = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    codes = stored[f"lm_head.weight.{FORMATS[format].weight.numbers}.transposed"]
    assert tuple(codes.dims) == (64, VOCAB)
    assert tuple(stored["model.embed_tokens.weight.int8"].dims) == (VOCAB, 64)
    assert operators(path)[-1] == "MatMul"


def test_it_runs_with_one_buffer_for_past_and_present(tmp_path):
    path = written(tiny_model(layers=1), tmp_path, "fp32")
    ids = IDS[:1, 2:]
    expected = OnnxSession(path).run(ids, torch.ones_like(ids)).logits
    torch.testing.assert_close(SharedCacheSession(path, length=32).run(ids), expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_such_graph_is_refused(tmp_path):
    export_onnx(tiny_model(layers=1), tmp_path / "half.onnx", precision="fp16")
    with pytest.raises(ValueError, match="expected float32 or integers for a graph for the CPU, found precision fp16"):
        write_cpu_graph(tmp_path / "half.onnx")
    export_onnx(tiny_model(layers=1), tmp_path / "old.onnx", precision="fp32", opset=21)
    with pytest.raises(ValueError, match="expected opset 23 for a graph for the CPU, found 21"):
        write_cpu_graph(tmp_path / "old.onnx")
    assert not (tmp_path / CPU).exists()


def test_the_command_writes_and_verifies_it(tmp_path, capsys):
    save_student(quantized(tiny_model(layers=1), format="int8"), tiny_tokenizer(), tmp_path / "student")
    options = ["--output", str(tmp_path / "out"), "--engine", "none", "--decode-steps", "2", "--prompts", "2"]
    options += ["--benchmark-repetitions", "0", "--cpu", "--prefill"]
    assert main([str(tmp_path / "student"), *options, "--precision", "fp8"]) == 2
    assert "found precision fp8, for which CPUs have no products" in capsys.readouterr().err
    assert main([str(tmp_path / "student"), *options, "--precision", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "passed  onnx int8 for the CPU, free run" in printed
    assert "passed  onnx int8, prefill graph" in printed
    assert (tmp_path / "out" / "onnx" / CPU).is_file()


def test_heads_that_its_attention_does_not_take_are_refused_before_anything_is_written(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "model", head_dim=8)
    assert main([folder, "--output", str(tmp_path / "out"), "--engine", "none", "--cpu"]) == 2
    assert (
        "expected attention heads of a multiple of 16 channels for a graph for the CPU, found 8"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
