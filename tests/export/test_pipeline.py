import importlib.util
import json

import onnx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from export import pipeline
from export.__main__ import main
from export.folders.student import load_student, rounded, save_student
from models.loading.reference import load_model
from models.quantization import quantized_linears
from models.structure.edits import apply_edit
from tests.helpers.tiny_models import quantized, tiny_model, tiny_tokenizer

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
QUICK = ["--decode-steps", "2", "--benchmark-repetitions", "1", "--prompts", "2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain and a quantized student as Hugging Face folders, and conversations to calibrate on."""
    root = tmp_path_factory.mktemp("models")
    save_student(tiny_model(layers=1), tiny_tokenizer(), root / "plain")
    save_student(quantized(tiny_model(layers=1)), tiny_tokenizer(), root / "quantized")
    record = json.dumps({"prompt": "What is 2 plus 2?", "response": "4"})
    (root / "conversations.jsonl").write_text("\n".join([record] * 12))
    return root


@needs_rtx
def test_the_whole_chain_and_a_second_export(folders, tmp_path, capsys):
    output = tmp_path / "out"
    (output / "engine").mkdir(parents=True)
    (output / "engine" / "mine.txt").write_text("keep")
    arguments = [str(folders / "quantized"), "--output", str(output), "--precision", "fp8"]
    arguments += ["--engine", "tensorrt_rtx", "--compute-capability", "8.9", "--prefill", *QUICK]
    assert main(arguments) == 0
    report = json.loads((output / "report.json").read_text())
    assert {row["path"] for row in report["artefacts"]} == {
        "student",
        "compressed",
        "onnx/model.onnx",
        "onnx/prefill.onnx",
        "onnx/engine-source.onnx",
        "engine/model-tensorrt_rtx-8.9.engine",
    }
    assert all(row["bytes"] > 0 and (output / row["path"]).exists() for row in report["artefacts"])
    statuses = {check["name"]: check["status"] for check in report["verification"]}
    assert statuses.pop("engine fp8, free run") == "not_run"
    assert set(statuses.values()) == {"passed"}
    assert set(statuses) == {
        *(f"onnx fp8, {part}" for part in ("prefill", "decode", "one prompt at a time", "free run")),
        *(f"onnx fp8 (float16 between), {part}" for part in ("prefill", "decode", "one prompt at a time")),
        "onnx fp8, longest prompt (1024 tokens)",
        "onnx fp8, prefill graph",
        "engine fp8, quantized products in the parsed network",
    }
    assert report["benchmark"][0]["tokens_per_second"] > 0
    assert {"torch", "onnxruntime", "tensorrt_rtx"} <= report["versions"].keys()
    AutoModelForCausalLM.from_pretrained(output / "student")

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "expected an output folder without an export, found student" in message
    assert "--overwrite" in message
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before

    fewer = [str(folders / "quantized"), "--output", str(output), "--engine", "none", "--overwrite", *QUICK]
    assert main(fewer) == 0
    assert (output / "engine" / "mine.txt").read_text() == "keep"
    assert not list(output.glob("engine/*.engine"))
    assert not (output / "onnx" / "engine-source.onnx").exists()
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_calibration_makes_fp8_possible_without_training(folders, tmp_path, capsys):
    arguments = [
        str(folders / "plain"),
        "--output",
        str(tmp_path / "out"),
        "--precision",
        "fp8",
        "--engine",
        "none",
        *QUICK,
    ]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "QuantizationAwareTraining" in message
    assert "--calibration" in message
    assert not (tmp_path / "out").exists()
    calibrated = ["--calibration", str(folders / "conversations.jsonl")]
    assert main([*arguments, *calibrated]) == 0
    again = [str(tmp_path / "out" / "student"), *arguments[1:], *calibrated, "--overwrite"]
    assert main(again) == 2
    assert "found 14 quantizers that have theirs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (["--layer-formats", "*=int8_g32", "*.down_proj=int4_g32", "*.q_proj=none"], {"int8_g32", "int4_g32"}),
        (["--layer-formats", "*=int8_g32", "lm_head=int4_g32", "--cpu"], {"int8_g32", "int4_g32"}),
        (["--average-bits", "6"], {"int4_g32", "int8_g64"}),
    ],
)
def test_layers_may_have_formats_of_their_own(how, expected, folders, tmp_path):
    arguments = [str(folders / "plain"), "--output", str(tmp_path), "--precision", "mixed", "--engine", "none", *QUICK]
    assert main([*arguments, "--calibration", str(folders / "conversations.jsonl"), *how]) == 0
    student, _ = load_student(str(tmp_path / "student"))
    found = {linear.format for linear in quantized_linears(student).values()}
    assert len(found) > 1 and found >= expected


def test_a_mixture_that_cannot_be_written_is_refused_before_it_is_calibrated(folders, tmp_path, capsys):
    arguments = [str(folders / "plain"), "--output", str(tmp_path / "out"), "--precision", "mixed", *QUICK]
    arguments += ["--calibration", str(folders / "conversations.jsonl"), "--layer-formats"]
    assert main([*arguments, "*.up_proj=int4_g32_zp"]) == 2
    assert "expected a symmetric format for an engine, found int4_g32_zp" in capsys.readouterr().err
    assert main([*arguments, "*=int8_g64", "--compressed", "--engine", "none"]) == 2
    assert "expected rows of whole groups of 64 weights for compressed-tensors" in capsys.readouterr().err
    assert main([*arguments, "*.nothing=int8_g32", "--engine", "none"]) == 2
    assert "found '*.nothing', which fits none of 7" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_verification_that_fails_ends_with_an_error(folders, tmp_path, capsys, monkeypatch):
    export = pipeline.export_onnx

    def wrong(model, path, **settings):
        model.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
        result = export(model, path, **settings)
        model.model.layers[0].mlp.down_proj.weight.data.div_(1.01)
        return result

    monkeypatch.setattr(pipeline, "export_onnx", wrong)
    output = tmp_path / "out"
    assert main([str(folders / "plain"), "--output", str(output), "--engine", "none", *QUICK]) == 2
    assert "onnx fp32, prefill: " in capsys.readouterr().err
    assert json.loads((output / "report.json").read_text())["verification"][0]["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing/folder/of/mine"], "expected a Hugging Face folder"),
        (["missing.ckpt"], "expected a checkpoint at 'missing.ckpt'"),
        (["plain", "--batch", "4", "2", "1"], "expected batch as smallest, usual and largest"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(arguments, message, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert main([*arguments, "--output", str(tmp_path / "out"), "--engine", "none"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_rtx
def test_fp8_engines_for_older_gpus_are_refused(folders, tmp_path, capsys):
    arguments = [str(folders / "quantized"), "--output", str(tmp_path / "out"), "--precision", "fp8"]
    assert main([*arguments, "--compute-capability", "8.6"]) == 2
    assert "at least 8.9 for an FP8 engine, found 8.6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_students_of_unequal_layers_export_from_a_folder_that_says_what_it_is(tmp_path, capsys, caplog):
    model = tiny_model(layers=2)
    apply_edit(model, {"op": "narrow_mlp", "layer": 1, "keep": list(range(32))})
    save_student(model, tiny_tokenizer(), tmp_path / "student")
    arguments = [str(tmp_path / "student"), "--output", str(tmp_path / "out"), "--engine", "none", *QUICK]
    assert main([*arguments, "--plain"]) == 2
    assert "found layers of 2 sizes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    with caplog.at_level("INFO"):
        assert main(arguments) == 0
    assert "student/ loads through Potstill only, not in plain transformers: it has layers of 2 sizes" in caplog.text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {check["status"] for check in report["verification"]} == {"passed"}
    kinds = {row["path"]: row["kind"] for row in report["artefacts"]}
    assert kinds["student"] == "student folder (Potstill loads it, plain transformers does not)"
    again, once = load_model(str(tmp_path / "out" / "student")), rounded(model, torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, once[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(("source", "precision"), [("quantized", "fp8"), ("plain", "fp32"), ("plain", "fp8")])
def test_a_graph_for_the_cpu_may_have_a_format_of_its_own(source, precision, folders, tmp_path, capsys):
    arguments = [str(folders / source), "--output", str(tmp_path / "out"), "--precision", precision, "--engine", "none"]
    arguments += ["--cpu", "int8", "--compressed", *QUICK]
    assert main(arguments) == 2
    assert "expected --calibration FILE.jsonl beside --cpu FORMAT" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--calibration", str(folders / "conversations.jsonl")]) == 0
    graphs = {name: onnx.load(tmp_path / "out/onnx" / name) for name in ("model.onnx", "cpu.onnx")}
    precisions = {name: {p.key: p.value for p in graph.metadata_props}["precision"] for name, graph in graphs.items()}
    assert precisions == {"model.onnx": precision, "cpu.onnx": "int8"}
    operators = {node.op_type for node in graphs["cpu.onnx"].graph.node}
    assert {"MatMulIntegerToFloat", "GroupQueryAttention"} <= operators
    student, _ = load_student(str(tmp_path / "out/student"))
    assert {linear.format for linear in quantized_linears(student).values()} == (
        {"fp8_e4m3"} if precision == "fp8" else set()
    )
    compressed = json.loads((tmp_path / "out/compressed/config.json").read_text())["quantization_config"]
    group = compressed["config_groups"]["group_0"]
    assert (group["weights"]["num_bits"], group["weights"]["type"], group["input_activations"]["dynamic"]) == (
        8,
        "int",
        True,
    )
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [row["name"] for row in report["benchmark"]] == ["student", "student_cpu"]
    statuses = {check["name"]: check["status"] for check in report["verification"]}
    assert set(statuses.values()) == {"passed"}
    assert {f"onnx {precision}, prefill", "onnx int8 for the CPU, prefill", "onnx int8 for the CPU, free run"} <= set(
        statuses
    )
    kinds = {row["path"]: row["kind"] for row in report["artefacts"]}
    assert kinds["compressed"] == "compressed-tensors folder int8"
    assert kinds["onnx/cpu.onnx"] == "ONNX int8 for ONNX Runtime on a CPU"
    assert {path.name for path in (tmp_path / "out/onnx").iterdir()} == {
        f"{name}{end}" for name in graphs for end in ("", ".data")
    }


@pytest.mark.long
def test_a_format_for_the_cpu_starts_from_the_weights_not_from_another_format(folders, tmp_path):
    """Calibrated to FP8 and, for the CPU, to INT8: the INT8 codes are those of the plain weights."""
    arguments = [str(folders / "plain"), "--engine", "none", "--compressed", "--cpu", "int8", *QUICK]
    arguments += ["--calibration", str(folders / "conversations.jsonl")]
    for precision in ("fp32", "fp8"):
        assert main([*arguments, "--precision", precision, "--output", str(tmp_path / precision)]) == 0
    one, other = (load_file(tmp_path / name / "compressed/model.safetensors") for name in ("fp32", "fp8"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_float8_format_for_the_cpu_is_refused(folders, tmp_path, capsys):
    arguments = [str(folders / "plain"), "--output", str(tmp_path / "out"), "--engine", "none", "--cpu", "fp8_e4m3"]
    assert main([*arguments, "--calibration", str(folders / "conversations.jsonl")]) == 2
    assert "expected float32 or integers for a graph for the CPU, found precision fp8_e4m3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
