"""A quantized cache is codes in the graph, on the CPU too, and gives what torch gives; what cannot hold it is refused."""

import json

import onnx
import pytest
import torch
from compressed_tensors.modeling.kvcache import KV_CACHE_ATTR
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from export.__main__ import main
from export.cpu_graph.to_cpu import write_cpu_graph
from export.folders.compressed import save_compressed
from export.folders.student import load_student, save_student
from export.onnx_graph.to_onnx import export_onnx
from export.serving.scorer import Scorer
from export.sessions.onnx_session import OnnxSession
from export.sessions.shared_cache import SharedCacheSession
from export.sessions.torch_session import TorchSession
from export.verify import verify
from models.quantization.cache import cache_format, cache_scales
from models.quantization.linear import quantized_linears
from models.structure.edits import apply_edit
from tests.helpers.tiny import QUIRKS
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.long

PROMPTS = left_padded_prompts()
IDS, MASK = PROMPTS["prompt_ids"], PROMPTS["prompt_mask"]
TYPES = {"fp8_e4m3": onnx.TensorProto.FLOAT8E4M3FN, "int8": onnx.TensorProto.INT8}


def logits(model):
    with torch.no_grad():
        return model(IDS, attention_mask=MASK).logits[MASK.bool()]


def io_types(path):
    graph = onnx.load(path, load_external_data=False).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output) if "." in v.name}


@pytest.mark.parametrize("kv_cache", TYPES)
@pytest.mark.parametrize(("family", "opset"), [("llama", 21), *((family, 23) for family in ("llama", *QUIRKS))])
def test_every_family_keeps_codes_in_its_cache(family, opset, kv_cache, tmp_path):
    model = quantized(tiny_model(family, layers=2, **QUIRKS.get(family, {})), format=None, kv_cache=kv_cache)
    export_onnx(model, tmp_path / "model.onnx", precision="fp32", opset=opset)
    assert set(io_types(tmp_path / "model.onnx").values()) == {TYPES[kv_cache]}
    checks = verify(model, tmp_path / "model.onnx", IDS, MASK, decode_steps=8)
    assert [check.status for check in checks] == ["passed"] * 3, [check.reason for check in checks]


@pytest.mark.parametrize(
    ("format", "half"), [("fp8_e4m3", False), ("fp8_e4m3", True), ("int8", False), ("int4_g32", True)]
)
def test_beside_quantized_projections(format, half, tmp_path):
    model = quantized(tiny_model(layers=2), format=format, kv_cache="fp8_e4m3")
    between = "float16" if half else "float32"
    export_onnx(model, tmp_path / "model.onnx", precision=format, activations=between)
    checks = verify(model, tmp_path / "model.onnx", IDS, MASK, decode_steps=8)
    assert [check.status for check in checks] == ["passed"] * len(checks), [check.reason for check in checks]


def test_a_wrong_scale_is_found(tmp_path):
    model = quantized(tiny_model(layers=2), format=None, kv_cache="int8")
    export_onnx(model, tmp_path / "model.onnx", precision="fp32")
    model.model.layers[1].self_attn.cache_quantizer.key.scale.mul_(1.05)
    checks = verify(model, tmp_path / "model.onnx", IDS, MASK, decode_steps=2)
    assert checks[0].status == "failed"
    assert "present.1.key" in checks[0].reason


@pytest.mark.parametrize("format", [None, "int4_g32"])
def test_on_the_cpu_attention_appends_codes_in_place(format, tmp_path):
    model = quantized(tiny_model(layers=2), format=format, kv_cache="int8")
    export_onnx(model, tmp_path / "model.onnx", precision=format or "fp32")
    path = write_cpu_graph(tmp_path / "model.onnx")
    nodes = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert nodes.count("GroupQueryAttention") == 2
    assert nodes.count("QuantizeLinear") == 0
    assert set(io_types(path).values()) == {onnx.TensorProto.INT8}
    checks = verify(model, path, IDS, MASK, decode_steps=8, for_cpu=True)
    assert {check.status for check in checks} == {"passed"}, checks
    session = SharedCacheSession(path, length=24)
    ids_1T = IDS[:1]
    ours = [session.run(ids_1T[:, :5]), session.run(ids_1T[:, 5:6]), session.run(ids_1T[:, 6:])]
    theirs = OnnxSession(path).run(ids_1T, torch.ones_like(ids_1T)).logits
    torch.testing.assert_close(torch.cat(ours, 1), theirs, rtol=0, atol=0.05 * float(theirs.abs().max()))


@pytest.mark.parametrize("kv_cache", TYPES)
def test_candidates_share_a_prefix_of_codes(kv_cache, tmp_path):
    model = quantized(tiny_model(layers=2), format=None, kv_cache=kv_cache)
    export_onnx(model, tmp_path / "model.onnx", precision="fp32")
    scores = [
        Scorer(session, tiny_tokenizer(), ("n", "y")).score("who: ", ["a", "bcd", "a", "xy"])
        for session in (OnnxSession(tmp_path / "model.onnx"), TorchSession(model))
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=5e-2)  # a code may fall to the other side
    assert torch.equal(scores[0][0], scores[0][2])


@pytest.mark.parametrize("format", [None, "int8_static"])
def test_a_folder_brings_it_back(format, tmp_path):
    model = quantized(tiny_model(layers=2), format=format, kv_cache="fp8_e4m3")
    save_student(model, tiny_tokenizer(), tmp_path / "student")
    loaded, _ = load_student(str(tmp_path / "student"))
    assert cache_format(loaded) == "fp8_e4m3"
    assert cache_scales(loaded) == cache_scales(model)
    assert torch.equal(logits(loaded), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert not [name for name in load_file(tmp_path / "student" / "model.safetensors") if "cache" in name]
    assert not torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("kv_cache", TYPES)
@pytest.mark.parametrize("format", [None, "fp8_e4m3", "int4_g32"])
def test_a_compressed_folder_rounds_in_plain_transformers(format, kv_cache, tmp_path):
    model = quantized(tiny_model(layers=2), format=format, kv_cache=kv_cache)
    folder = save_compressed(model, tiny_tokenizer(), tmp_path / "compressed")
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"]) == (8, "float" if kv_cache == "fp8_e4m3" else "int")
    tensors = load_file(folder / "model.safetensors")
    scales = [float(tensors[f"model.layers.{n}.self_attn.{part}_scale"]) for n in range(2) for part in "kv"]
    assert scales == cache_scales(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not quantized_linears(loaded)
    assert hasattr(loaded.model.layers[0].self_attn, KV_CACHE_ATTR)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_compressed_folder_that_would_lose_the_scales_is_refused_before_calibration(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("export.folders.compressed.CACHE", "cache")
    save_student(tiny_model(layers=1), tiny_tokenizer(), tmp_path / "dense")
    (tmp_path / "talks.jsonl").write_text(json.dumps({"prompt": "hello", "response": "world"}) + "\n")
    common = [str(tmp_path / "dense"), "--engine", "none", "--calibration", str(tmp_path / "talks.jsonl")]
    assert main([*common, "--output", str(tmp_path / "out"), "--kv-cache", "int8", "--compressed"]) == 2
    assert "expected transformers before 5.24 for keys and values in int8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected transformers before 5.24"):
        save_compressed(quantized(tiny_model(layers=1), kv_cache="fp8_e4m3"), tiny_tokenizer(), tmp_path / "compressed")
    assert not (tmp_path / "compressed").exists()


def test_the_command_line_calibrates_the_cache_alone(tmp_path):
    save_student(tiny_model(layers=1), tiny_tokenizer(), tmp_path / "dense")
    talk = {"prompt": "hello", "response": "world"}
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk) + "\n")
    common = [str(tmp_path / "dense"), "--engine", "none", "--calibration", str(tmp_path / "talks.jsonl")]
    quick = ["--decode-steps", "2", "--benchmark-repetitions", "0"]
    assert (
        main([*common, *quick, "--output", str(tmp_path / "out"), "--kv-cache", "int8", "--cpu", "--compressed"]) == 0
    )
    assert set(io_types(tmp_path / "out/onnx/model.onnx").values()) == {onnx.TensorProto.INT8}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {check["status"] for check in report["verification"]} == {"passed"}
    assert cache_format(load_student(str(tmp_path / "out/student"))[0]) == "int8"


@pytest.mark.parametrize("kv_cache", TYPES)
def test_an_engine_takes_codes(kv_cache, tmp_path):
    save_student(tiny_model(layers=2), tiny_tokenizer(), tmp_path / "dense")
    (tmp_path / "talks.jsonl").write_text(json.dumps({"prompt": "hello", "response": "world"}) + "\n")
    common = [str(tmp_path / "dense"), "--engine", "tensorrt_rtx", "--calibration", str(tmp_path / "talks.jsonl")]
    quick = ["--decode-steps", "2", "--benchmark-repetitions", "0", "--precision", "fp8"]
    assert main([*common, *quick, "--output", str(tmp_path / "out"), "--kv-cache", kv_cache]) == 0
    assert set(io_types(tmp_path / "out/onnx/engine-source.onnx").values()) == {TYPES[kv_cache]}
    checks = {check["name"]: check for check in json.loads((tmp_path / "out/report.json").read_text())["verification"]}
    assert checks["engine fp8, quantized products in the parsed network"]["status"] == "passed"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--kv-cache", "fp8_e4m3", "--cpu"], "found fp8_e4m3, which ONNX Runtime's attention"),
        (["--kv-cache", "int8", "--method", "gptq"], "expected a quantized precision with --method, found fp32"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(options, sentence, tmp_path, capsys):
    save_student(tiny_model(layers=1), tiny_tokenizer(), tmp_path / "dense")
    (tmp_path / "talks.jsonl").write_text(json.dumps({"prompt": "hello", "response": "world"}) + "\n")
    common = [str(tmp_path / "dense"), "--engine", "none", "--calibration", str(tmp_path / "talks.jsonl")]
    assert main([*common, "--output", str(tmp_path / "out"), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quantizers_that_still_observe_are_refused(tmp_path):
    model = tiny_model(layers=1)
    apply_edit(model, {"op": "quantize_cache", "format": "int8"})
    with pytest.raises(ValueError, match=r"found 1 layers whose still observe"):
        export_onnx(model, tmp_path / "model.onnx", precision="fp32")
