"""Folder, compressed folder and graph of one export hold the same numbers."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from export.__main__ import main
from export.folders.student import load_student, save_student
from models.quantization.linear import quantized_linears
from models.structure.edits import apply_edit
from tests.helpers.tiny_models import quantized, tiny_model, tiny_tokenizer

QUICK = ["--engine", "none", "--decode-steps", "1", "--prompts", "1", "--benchmark-repetitions", "0"]
SIZES = {"layers": 2, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4}


def exported(model, folder, *options):
    """The output folder of an export, and the initializers of its graph."""
    save_student(model, tiny_tokenizer(), folder / "model")
    assert main([str(folder / "model"), "--output", str(folder / "out"), *QUICK, *options]) == 0
    graph = onnx.load(folder / "out/onnx/model.onnx").graph
    return folder / "out", {value.name: torch.tensor(array(value)) for value in graph.initializer}


def array(value):
    """Of an initializer; FP8 and INT4 as floats and bytes that torch knows."""
    found = numpy_helper.to_array(value)
    return found.astype({"float8_e4m3fn": np.float32, "int4": np.int8}.get(found.dtype.name, found.dtype))


def in_graph(graph, name):
    """A weight that is not quantized, as the model has it; what is tied is stored once."""
    if f"{name}.transposed" in graph:
        return graph[f"{name}.transposed"].t()
    return graph[name if name in graph else "lm_head.weight"]


@pytest.mark.parametrize(
    ("format", "tied"),
    [("fp8_e4m3", True), ("int8", False), ("int8_g64", True), ("int4_g64", False), ("int4_g64_zp", True)],
)
def test_of_a_quantized_student(format, tied, tmp_path):
    model = quantized(tiny_model(**SIZES, tie_word_embeddings=tied), format=format)
    output, graph = exported(model, tmp_path, "--precision", format)
    student, _ = load_student(str(output / "student"))
    plain = load_file(output / "student/model.safetensors")
    exact = CompressedTensorsConfig(dequantize=True)
    compressed = AutoModelForCausalLM.from_pretrained(
        output / "compressed", dtype=torch.float32, quantization_config=exact
    )
    linears = quantized_linears(student)
    assert len(linears) == 14
    for name, linear in linears.items():
        codes = linear.weight_quantizer.codes(linear.weight)
        assert torch.equal(
            codes, quantized_linears(model)[name].weight_quantizer.codes(quantized_linears(model)[name].weight)
        )
        (stored,) = [
            tensor
            for key, tensor in graph.items()
            if key.startswith(f"{name}.weight.") and "scale" not in key and "zero" not in key
        ]
        assert torch.equal(stored.t().float(), codes.float())
        assert torch.equal(compressed.get_parameter(f"{name}.weight"), linear.weight_quantizer(linear.weight))
        assert torch.equal(plain[f"{name}.weight"], linear.weight_quantizer(linear.weight).bfloat16())
    packed = load_file(output / "compressed/model.safetensors")
    others = [name for name in plain if name.removesuffix(".weight") not in linears]
    assert len(others) == 2 * 2 + 1 + (1 if tied else 2)
    for name in others:
        assert plain[name].dtype == packed[name].dtype == torch.bfloat16
        assert torch.equal(packed[name], plain[name]) and torch.equal(in_graph(graph, name), plain[name].float())
    assert ("lm_head.weight" in plain) != tied


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_of_a_student_in_floating_point_whatever_its_layers(precision, tmp_path):
    model = tiny_model(layers=2)
    apply_edit(model, {"op": "narrow_mlp", "layer": 1, "keep": list(range(64))})
    output, graph = exported(quantized(model), tmp_path, "--precision", precision)
    plain = load_file(output / "student/model.safetensors")
    for name, weight in plain.items():
        assert torch.equal(in_graph(graph, name), weight.to(torch.float16 if precision == "fp16" else torch.float32))


def test_float32_on_request(tmp_path):
    model = tiny_model(layers=1)
    output, graph = exported(model, tmp_path, "--student-dtype", "float32")
    plain = load_file(output / "student/model.safetensors")
    assert torch.equal(plain["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(in_graph(graph, "model.embed_tokens.weight"), model.model.embed_tokens.weight)
    assert json.loads((output / "student/config.json").read_text())["dtype"] == "float32"
