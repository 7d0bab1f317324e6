"""What is special about the hidden size: epsilon, Gemma's scaled embedding, gains of both conventions."""

from typing import Any

import pytest
import torch
from torch import nn

from models.architecture import decoder_layers
from models.structure.edits import apply_edit
from tests.helpers.masking import CUTS, close, cut_model, logits, masked_logits
from tests.helpers.tiny import tiny_model

CHANNELS = CUTS["channels"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_epsilon_keeps_its_weight_in_the_mean(family: str) -> None:
    """One that matters: a tenth of the mean square of the first norm's input, or more."""
    model = cut_model(family, rms_norm_eps=0.5)
    expected = masked_logits(model, CHANNELS)
    apply_edit(model, CHANNELS)
    close(logits(model), expected)
    assert model.config.rms_norm_eps == pytest.approx(0.5 * 32 / 24)
    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    assert {norm.variance_epsilon for norm in norms} == {model.config.rms_norm_eps}
    assert len(norms) == 2 * 3 + 1


def test_epsilon_of_gemma_stays() -> None:
    """The norms on the stream are then exact; without output norms that matter, so is the model."""
    model = cut_model("gemma2", rms_norm_eps=0.5)
    for layer in decoder_layers(model):
        for norm in layer.output_norms:
            norm.eps = 0.0
    expected = masked_logits(model, CHANNELS)
    apply_edit(model, CHANNELS)
    close(logits(model), expected)
    assert model.config.rms_norm_eps == 0.5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_channels_go_in_two_steps(family: str) -> None:
    model = cut_model(family)
    apply_edit(model, {"op": "narrow_hidden", "keep": list(range(4, 32))})
    second = {"op": "narrow_hidden", "keep": list(range(0, 28, 2))}
    expected = masked_logits(model, second)
    apply_edit(model, second)
    close(logits(model), expected)


def test_gemmas_embedding_is_scaled_as_a_fresh_model_of_that_size_would() -> None:
    model = tiny_model("gemma3_text")
    apply_edit(model, CHANNELS)
    embedding: Any = model.get_input_embeddings()
    fresh: Any = tiny_model("gemma3_text", hidden_size=24).get_input_embeddings()
    assert embedding.scalar_embed_scale == fresh.scalar_embed_scale
    assert torch.equal(embedding.embed_scale, fresh.embed_scale)


@pytest.mark.parametrize(("family", "offset"), [("llama", 0), ("gemma2", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gains_grow_in_both_conventions(family: str, offset: int, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    weight: nn.Parameter = decoder_layers(model)[0].stream_norms[0].weight
    gain = (weight.detach().float() + offset)[CHANNELS["keep"]]
    apply_edit(model, CHANNELS)
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.float() + offset, gain * (32 / 24) ** 0.5, rtol=0.01, atol=0.01)


def test_head_norms_keep_their_gains() -> None:
    model = tiny_model("qwen3")
    before = model.model.layers[0].self_attn.q_norm.weight.detach().clone()
    apply_edit(model, CHANNELS)
    assert torch.equal(model.model.layers[0].self_attn.q_norm.weight, before)
