"""The paired test of free runs: what it says, and that it is about how good an artefact is, not about how near."""

import pytest
import torch

from export.onnx_graph.to_onnx import export_onnx
from export.sessions.onnx_session import OnnxSession
from export.verify import faithfulness
from export.verify.faithfulness import (
    MARGIN,
    MARGIN_UNROUNDED,
    answer_tokens,
    compare_served,
    judged_by,
    num_tokens_for,
    sampled,
    torch_served,
    without_rounded_inputs,
)
from export.verify.served import Served
from models.losses import forward_kl
from models.post_training.kernels import rounded_in_blocks
from models.quantization import quantized_linears
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model

PROMPTS = left_padded_prompts()
ROUNDED = quantized(tiny_model(layers=1))


def served(shift: float, noise: float, scores: tuple[float, ...] = (), tokens: int = 2000) -> Served:
    generator = torch.Generator().manual_seed(0)
    kl_N = 0.1 + shift + noise * torch.randn(tokens, generator=generator)
    return Served(kl_N, torch.arange(tokens) // 10, scores)


@pytest.mark.parametrize(
    ("shift", "noise", "verdict", "status"),
    [
        (0.0, 0.1, "equivalent", "passed"),
        (0.05, 0.1, "different", "failed"),
        (-0.05, 0.1, "different", "failed"),
        (0.0, 3.0, "too few tokens to say", "not_run"),
        (float("nan"), 0.1, "different", "failed"),
        (float("inf"), 0.1, "different", "failed"),
    ],
)
def test_the_verdict_is_where_the_interval_lies(shift, noise, verdict, status):
    check = compare_served("a graph", ROUNDED, served(shift, noise), served(0.0, 0.0))
    assert (check.verdict, check.status) == (verdict, status)
    assert check.bound == MARGIN and (check.reason is None) == (status == "passed")


def test_a_model_that_rounds_nothing_has_a_narrow_margin():
    check = compare_served("a graph", tiny_model(layers=1), served(0.005, 0.0), served(0.0, 0.0))
    assert (check.status, check.bound) == ("failed", MARGIN_UNROUNDED)
    assert num_tokens_for(tiny_model(layers=1)) < num_tokens_for(ROUNDED)


def test_the_task_score_counts_too():
    good, bad = tuple([1.0] * 200), tuple([1.0] * 150 + [0.0] * 50)
    assert compare_served("a graph", ROUNDED, served(0, 0, good), served(0, 0, good)).status == "passed"
    check = compare_served("a graph", ROUNDED, served(0, 0, bad), served(0, 0, good))
    assert check.verdict == "different" and "task score -0.25" in check.reason


def test_a_right_graph_is_equivalent_and_one_of_other_weights_is_not(tmp_path):
    model = quantized(tiny_model(layers=2))
    export_onnx(model, tmp_path / "model.onnx", precision="fp8")
    held_out = judged_by(model, sampled(model, PROMPTS, 512))
    reference = torch_served(model, held_out, lambda: None)
    assert len(reference.kl_N) >= 300 and reference.kl_N.mean() > 0
    check = compare_served(
        "fp8", model, held_out.measure(OnnxSession(tmp_path / "model.onnx"), [2], lambda: None), reference
    )
    assert check.status == "passed", check.reason
    other = quantized(tiny_model(layers=2, seed=5))
    export_onnx(other, tmp_path / "other.onnx", precision="fp8")
    check = compare_served(
        "fp8", model, held_out.measure(OnnxSession(tmp_path / "other.onnx"), [2], lambda: None), reference
    )
    assert check.verdict == "different"


def test_sampled_answers_are_the_same_every_time():
    model = tiny_model(layers=1)
    first, second = (sampled(model, PROMPTS, 256).batches for _ in range(2))
    assert len(first) == 2 and all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True)
    )
    assert not torch.equal(first[0]["input_ids"][:, -8:], first[1]["input_ids"][:, -8:])
    assert len({index for batch in first for index in batch["index"]}) == 6


def test_a_model_of_short_answers_is_sampled_until_there_are_enough():
    model = tiny_model(layers=1)
    model.generation_config.eos_token_id = list(range(model.config.vocab_size - 1))  # nearly every token ends an answer
    held_out = sampled(model, PROMPTS, 32)
    assert len(held_out.batches) > 5 and 32 <= answer_tokens(held_out) <= 64
    assert len(sampled(model, PROMPTS, 10**6).batches) == faithfulness._ROUNDS


def test_torch_rounds_inputs_as_kernels_do_where_weights_alone_are_quantized(monkeypatch):
    model = quantized(tiny_model(), format="int4_g32")
    held_out = judged_by(model, sampled(model, PROMPTS, 64))
    found = torch_served(model, held_out, lambda: None)
    monkeypatch.setattr(faithfulness, "rounded_in_blocks", lambda x, block: x)
    exact = torch_served(model, held_out, lambda: None)
    assert float(exact.kl_N.abs().max()) < 3e-6 < float(found.kl_N.mean()) / 3
    # Against the definition, on the first answer token behind each prompt.
    for linear in quantized_linears(model).values():
        linear.register_forward_pre_hook(lambda _, inputs: rounded_in_blocks(inputs[0], 32))
    ids, mask = PROMPTS["prompt_ids"], PROMPTS["prompt_mask"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
        for linear in quantized_linears(model).values():
            linear._forward_pre_hooks.clear()
        plain = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    torch.testing.assert_close(found.kl_N[:3], forward_kl(logits, plain), rtol=3e-2, atol=1e-6)


def test_the_judge_rounds_no_inputs_and_shares_the_weights():
    model = quantized(tiny_model(layers=1), kv_cache="int8")
    judge = without_rounded_inputs(model)
    assert all(linear.input_quantizer is None for linear in quantized_linears(judge).values())
    assert judge.model.layers[0].self_attn.q_proj.weight is model.model.layers[0].self_attn.q_proj.weight
    assert all(linear.input_quantizer is not None for linear in quantized_linears(model).values())
