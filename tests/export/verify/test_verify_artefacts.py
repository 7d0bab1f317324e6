"""All artefacts of an export: every graph is looked at, faults are named, what needs a GPU is never passed."""

import onnx
import pytest
import torch
from onnx import numpy_helper

from export.cpu_graph.to_cpu import write_cpu_graph
from export.engine.write import Engines
from export.layout import GRAPH
from export.onnx_graph.labels import write_labels
from export.onnx_graph.prefill import write_prefill
from export.onnx_graph.to_onnx import export_onnx
from export.phases import Phases
from export.verify import Extent, verify, verify_artefacts
from export.verify.checks import Check, Comparison, VerificationError, raise_on_failure
from export.verify.everything import _not_run, longest_prompt
from export.verify.exactness import LIMIT
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model

PROMPTS = left_padded_prompts()
IDS, MASK = PROMPTS["prompt_ids"], PROMPTS["prompt_mask"]
WITH = {"extent": Extent(decode_steps=3, longest=40), "prompts": PROMPTS, "phases": Phases()}


def perturbed(path, tmp_path, name, change):
    """A copy of a graph with one stored tensor changed."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_every_graph_is_verified(format, tmp_path):
    model = tiny_model(layers=1) if format == "fp32" else quantized(tiny_model(layers=1), format=format)
    export_onnx(model, tmp_path / GRAPH, precision=format)
    write_prefill(tmp_path / GRAPH)
    write_labels(tmp_path / GRAPH, {"a": 5, "b": 7})
    write_cpu_graph(tmp_path / GRAPH)
    found = verify_artefacts(model, tmp_path, None, format, **WITH)
    parts = ["prefill", "decode", "one prompt at a time", "prefill graph", "longest prompt (40 tokens)"]
    names = [f"onnx {format}{title}, {part}" for title in ("", " for the CPU") for part in parts]
    names.remove(f"onnx {format} for the CPU, prefill graph")
    names.insert(4, f"onnx {format}, label graph")
    names += [f"onnx {format}{title}, free run" for title in ("", " for the CPU")]
    assert [check.name for check in found.checks] == names
    assert {check.status for check in found.checks} == {"passed"}, [check.reason for check in found.checks]
    assert list(found.served) == ["student", "student_cpu"]
    assert all((check.rounding_ratio or 0) < 1.5 for check in found.checks)


def test_prompts_in_groups_are_all_looked_at(tmp_path, monkeypatch):
    model = tiny_model(layers=1)
    export_onnx(model, tmp_path / GRAPH, precision="fp32")
    whole = verify_artefacts(model, tmp_path, None, "fp32", **WITH).checks
    monkeypatch.setattr("export.verify.everything.PROMPTS_AT_ONCE", 2)
    parts = verify_artefacts(model, tmp_path, None, "fp32", **WITH).checks
    assert [(check.name, check.tokens) for check in parts] == [(check.name, check.tokens) for check in whole]
    assert parts[0].tokens == 3 and parts[1].tokens == 9


def test_a_changed_weight_fails_and_is_named(plain_model, graphs, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight.transposed"
    path = perturbed(graphs["fp32"], tmp_path, name, lambda values: values.__imul__(1.01))
    checks = [check.as_dict() for check in verify(plain_model, path, IDS, MASK, decode_steps=4)]
    assert [check["status"] for check in checks] == ["failed"] * 3
    assert all("at model.layers.1.mlp.down_proj gives " in check["reason"] for check in checks)
    with pytest.raises(
        VerificationError, match=r"onnx fp32, prefill: .* times what rounding explains, above the bound of 4"
    ):
        raise_on_failure(checks)


def test_one_changed_fp8_code_fails(quantized_model, graphs, tmp_path):
    def change(values):
        values[3, 5] = -values[3, 5] + values.dtype.type(0.5)

    path = perturbed(graphs["fp8"], tmp_path, "model.layers.2.self_attn.o_proj.weight.fp8_e4m3.transposed", change)
    assert {check.status for check in verify(quantized_model, path, IDS, MASK, decode_steps=2)} == {"failed"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_a_failure(value, plain_model, graphs, tmp_path):
    path = perturbed(graphs["fp32"], tmp_path, "model.norm.weight", lambda values: values.fill(value))
    assert {check.status for check in verify(plain_model, path, IDS, MASK, decode_steps=1)} == {"failed"}


def test_not_a_number_in_both_is_a_failure():
    comparison = Comparison()
    comparison.add("a", torch.full((2, 3), torch.nan), torch.full((2, 3), torch.nan), 1e-3)
    assert comparison.check("a", LIMIT).status == "failed"


def test_verification_leaves_the_model_alone(quantized_model, graphs):
    before = {name: tensor.clone() for name, tensor in quantized_model.state_dict().items()}
    verify(quantized_model, graphs["fp8"], IDS, MASK, decode_steps=2)
    after = quantized_model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not any(module._forward_pre_hooks for module in quantized_model.modules())


def test_engines_without_a_gpu_are_not_run_and_never_passed():
    engines = Engines.__new__(Engines)
    object.__setattr__(engines, "labels", None)
    checks = _not_run(engines, "fp16", "no NVIDIA GPU")
    assert [(check.name, check.status, check.reason) for check in checks] == [
        ("engine fp16, free run", "not_run", "no NVIDIA GPU")
    ]
    raise_on_failure([check.as_dict() for check in checks])


def test_a_failure_says_how_far_from_harm_it_is():
    failed = Check("onnx fp16, prefill", "failed", reason="4.2 times what rounding explains")
    free = Check("onnx fp16, free run", "passed", verdict="equivalent", difference=2e-5)
    with pytest.raises(
        VerificationError, match=r"Free runs .* onnx fp16, free run: equivalent, \+2e-05 nats per token"
    ):
        raise_on_failure([failed.as_dict(), free.as_dict()])


def test_the_longest_prompt_repeats_all_tokens():
    longest_1T = longest_prompt(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]]), 7)
    assert longest_1T.tolist() == [[5, 6, 7, 5, 6, 7, 5]]
