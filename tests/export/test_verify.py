import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_models import left_padded_prompts

from export.checks import Comparison, VerificationError, raise_on_failure
from export.reference import Reference, record
from export.verify import verify, verify_engine
from export.verify_prompts import bounded_by_kl

PROMPTS = left_padded_prompts()
IDS, MASK = PROMPTS["prompt_ids"], PROMPTS["prompt_mask"]


def perturbed(path, tmp_path, name, change):
    """A copy of a graph with one stored tensor changed."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_changed_weight_fails_and_is_named(plain_model, graphs, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight.transposed"
    path = perturbed(graphs["fp32"], tmp_path, name, lambda values: values.__imul__(1.01))
    checks = [check.as_dict() for check in verify(plain_model, path, IDS, MASK, decode_steps=4)]
    assert [check["status"] for check in checks] == ["failed"] * 3
    assert "first layer beyond it: present.2.key at step 0" in checks[0]["reason"]
    assert 0 < checks[0]["mean_abs_difference"] < checks[0]["max_abs_difference"]
    with pytest.raises(
        VerificationError, match=r"onnx fp32, prefill: relative difference .* above the bound 0.0001.*step 0"
    ):
        raise_on_failure(checks)


def test_one_changed_fp8_code_fails(quantized_model, graphs, tmp_path):
    def change(values):
        values[3, 5] = -values[3, 5] + values.dtype.type(0.5)

    path = perturbed(graphs["fp8"], tmp_path, "model.layers.2.self_attn.o_proj.weight.fp8_e4m3.transposed", change)
    prefill, decode, *_ = verify(quantized_model, path, IDS, MASK, decode_steps=4)
    assert (prefill.status, decode.status) == ("failed", "failed")


def test_a_changed_activation_scale_fails(quantized_model, graphs, tmp_path):
    name = "model.layers.1.mlp.down_proj.input_quantizer.scale"
    path = perturbed(graphs["fp8"], tmp_path, name, lambda values: values.__imul__(1.1))
    assert verify(quantized_model, path, IDS, MASK, decode_steps=1)[0].status == "failed"


def test_nan_is_a_failure(plain_model, graphs, tmp_path):
    path = perturbed(graphs["fp32"], tmp_path, "model.norm.weight", lambda values: values.fill(float("nan")))
    assert verify(plain_model, path, IDS, MASK, decode_steps=1)[0].status == "failed"


def test_the_reference_run_leaves_the_model_alone(quantized_model):
    before = {name: tensor.clone() for name, tensor in quantized_model.state_dict().items()}
    reference = record(quantized_model, IDS, MASK, decode_steps=3)
    assert len(reference.steps) == 4
    assert reference.steps[-1].attention_mask.shape == (3, 12)
    assert len(reference.steps[0].quantizer_inputs) == 21
    after = quantized_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="only says something without a GPU")
def test_engines_without_a_gpu_are_not_run_and_never_passed(plain_model, tmp_path):
    reference = record(plain_model, IDS, MASK, decode_steps=1)
    checks = verify_engine(reference, tmp_path / "model.engine", "fp16")
    assert {check.status for check in checks} == {"not_run"}
    assert all(check.reason and "GPU" in check.reason for check in checks)
    raise_on_failure([check.as_dict() for check in checks])


def test_a_text_is_identical_only_if_every_token_is():
    comparison = Comparison()
    first, second = torch.eye(4)[[0, 1, 2]], torch.eye(4)[[3, 3, 3]]
    comparison.add_logits(0, first, first)
    comparison.add_choices(first, first)
    comparison.add_choices(second, torch.eye(4)[[3, 2, 3]])
    comparison.add_choices(first, first)
    assert comparison.check("text", 1.0).identical_texts == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["fp32", "fp8"])
def test_greedy_texts_are_counted(name, graphs, plain_model, quantized_model):
    model = plain_model if name == "fp32" else quantized_model
    checks = {check.name: check for check in verify(model, graphs[name], IDS, MASK, decode_steps=4)}
    assert checks[f"onnx {name}, decode"].identical_texts == 1.0
    assert checks[f"onnx {name}, prefill"].identical_texts is None


@pytest.mark.parametrize(
    ("sensitivity", "kernel_rounding", "bound"),
    [
        (None, None, 0.01),
        (0.001, None, 0.01),
        (0.02, None, 0.04),
        (None, 0.03, 0.06),
        (0.02, 0.03, 0.06),
        (0.03, 0.02, 0.06),
    ],
)
def test_distributions_may_be_as_far_apart_as_the_model_is_from_itself(sensitivity, kernel_rounding, bound):
    comparison = Comparison()
    comparison.add_distributions(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 1.0]]))
    reference = Reference([], sensitivity=sensitivity, kernel_rounding=kernel_rounding)
    check = bounded_by_kl(comparison, "a run", reference)
    assert (check.bound, check.status) == (pytest.approx(bound), "passed" if check.kl <= bound else "failed")
    assert check.sensitivity == max((kl for kl in (sensitivity, kernel_rounding) if kl is not None), default=None)
