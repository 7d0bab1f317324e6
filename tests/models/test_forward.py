"""Answer positions only, and copies for generation that compute the same function."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from datamodules.collate import IGNORE_INDEX, Batch
from models.copies import inference_copy
from models.forward import answer_hidden, answer_labels, answer_logits
from models.quantization import fake_quantize, freeze_scales, quantized_linears
from models.structure.edits import apply_edit
from tests.helpers.tiny import tiny_model

NAMES = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


@pytest.fixture
def quantized(model: PreTrainedModel, batch: Batch) -> PreTrainedModel:
    apply_edit(model, {"op": "fake_quantize", "format": "fp8_e4m3", "modules": NAMES})
    answer_logits(model.train(), batch)
    freeze_scales(model)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_answer_logits_are_the_full_forward_at_these_positions(family: str, batch: Batch) -> None:
    model = tiny_model(family)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = [
        full[row, position - 1]
        for row in range(len(full))
        for position in range(full.shape[1])
        if batch["labels"][row, position] != IGNORE_INDEX
    ]
    torch.testing.assert_close(answer_logits(model, batch), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert answer_hidden(model, batch).shape == (len(expected), 32)


def test_labels_are_the_tokens_after_these_positions(batch: Batch) -> None:
    expected = [token for row in batch["labels"].tolist() for token in row if token != IGNORE_INDEX]
    assert answer_labels(batch).tolist() == expected
    assert sum(token == 1 for token in expected) == 5  # each answer ends with its end token


def test_gradients_reach_every_parameter(model: PreTrainedModel, batch: Batch) -> None:
    nn.functional.cross_entropy(answer_logits(model, batch), answer_labels(batch)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_copy_in_float32_computes_the_same(quantized: PreTrainedModel, batch: Batch) -> None:
    duplicate = inference_copy(quantized.train(), torch.float32)
    assert torch.equal(answer_logits(duplicate, batch), answer_logits(quantized, batch))
    assert not duplicate.training
    assert quantized.training
    assert not any(parameter.requires_grad for parameter in duplicate.parameters())
    assert all(parameter.requires_grad for parameter in quantized.parameters())


def test_copy_bakes_quantized_weights(quantized: PreTrainedModel) -> None:
    duplicate = inference_copy(quantized, torch.float32)
    for name, linear in quantized_linears(quantized).items():
        baked = quantized_linears(duplicate)[name]
        expected = fake_quantize(linear.weight, linear.weight_quantizer.scale)
        assert torch.equal(baked.weight, expected)
        assert not torch.equal(baked.weight, linear.weight)
        assert isinstance(baked.weight_quantizer, nn.Identity)
        assert baked.input_quantizer.frozen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copy_leaves_buffers_in_float32(quantized: PreTrainedModel, dtype: torch.dtype) -> None:
    duplicate = inference_copy(quantized, dtype)
    assert {parameter.dtype for parameter in duplicate.parameters()} == {dtype}
    ours, theirs = dict(duplicate.named_buffers()), dict(quantized.named_buffers())
    assert any("inv_freq" in name for name in ours)
    assert any("input_quantizer.scale" in name for name in ours)
    for name, buffer in ours.items():
        assert buffer.dtype == (torch.int64 if name.endswith("histogram") else torch.float32)
        assert torch.equal(buffer, theirs[name])


def test_the_original_is_untouched(quantized: PreTrainedModel, batch: Batch) -> None:
    before = {name: (id(tensor), tensor.clone()) for name, tensor in quantized.named_parameters()}
    expected = answer_logits(quantized, batch)
    duplicate = inference_copy(quantized, torch.bfloat16)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    for name, parameter in quantized.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert torch.equal(answer_logits(quantized, batch), expected)
    assert len(quantized_linears(quantized)) == len(NAMES)


def test_copy_keeps_tied_embeddings_tied(model: PreTrainedModel) -> None:
    duplicate = inference_copy(model, torch.bfloat16)
    assert duplicate.get_output_embeddings().weight is duplicate.get_input_embeddings().weight


def test_copy_of_an_observing_model_leaves_its_ranges_alone(model: PreTrainedModel, batch: Batch) -> None:
    apply_edit(model.train(), {"op": "fake_quantize", "format": "fp8_e4m3", "modules": NAMES})
    assert torch.isfinite(answer_logits(inference_copy(model, torch.bfloat16), batch)).all()
    for linear in quantized_linears(model).values():
        assert linear.input_quantizer.amax == 0
        assert linear.input_quantizer.pending is None
        assert not linear.input_quantizer.frozen
