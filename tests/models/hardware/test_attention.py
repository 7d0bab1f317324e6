"""The student's attention in training: the function of transformers' own eager one, or a refusal."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.architecture import FAMILIES, decoder_layers
from models.hardware.attention import NAME, attend, use_attention
from models.structure.edits import apply_edit
from tests.helpers.masking import cut_model
from tests.helpers.tiny import tiny_batch

families = pytest.mark.parametrize("family", FAMILIES)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    batch = tiny_batch()
    model.zero_grad()
    model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@families
def test_gradients_equal_those_of_eager_attention(family: str) -> None:
    """With windows that are shorter than the rows, and layers of different sizes."""
    model = cut_model(family, sliding_window=4)
    apply_edit(model, {"op": "narrow_query_heads", "layer": 1, "keep": [0, 2, 5, 6]})
    use_attention(model)
    assert model.config._attn_implementation == ("eager" if family == "gemma2" else NAME)
    ours = gradients(model)
    model.set_attn_implementation("eager")
    theirs = gradients(model)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4)


def test_the_window_of_these_tests_matters() -> None:
    model, wide = cut_model("mistral", sliding_window=4), cut_model("mistral", sliding_window=None)
    assert not torch.allclose(gradients(model)["model.norm.weight"], gradients(wide)["model.norm.weight"])


def test_a_soft_cap_is_never_dropped() -> None:
    model = cut_model("gemma2")
    attention = decoder_layers(model)[0].attention
    x_BHTK = torch.randn(1, 8, 3, 8)
    with pytest.raises(
        ValueError, match=r"expected attention without a soft cap, found one of 4.0; load the model with"
    ):
        attend(attention, x_BHTK, x_BHTK, x_BHTK, None, softcap=attention.attn_logit_softcapping)
