"""Heads of real families: the logits they give are the model's own."""

import pytest
import torch
from torch import nn

from models.losses import Head, check_head, head_of
from models.quantization.linear import FakeQuantizedLinear
from tests.helpers.tiny import tiny_model

FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "phi": {"tie_word_embeddings": False, "num_key_value_heads": 4},  # a head with a bias
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str) -> None:
    model = tiny_model(family, **FAMILIES[family])
    head = head_of(model)
    tokens_BT = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected_TV = model(tokens_BT).logits[0]
        hidden_TD = model.base_model(tokens_BT).last_hidden_state[0]
    torch.testing.assert_close(head.logits(hidden_TD), expected_TV)
    torch.testing.assert_close(head.logits(hidden_TD, 7), expected_TV[:, :7])
    assert head.weight_VD is model.get_output_embeddings().weight
    check_head(model, head)


def test_each_family_uses_its_part() -> None:
    assert head_of(tiny_model("gemma2", **FAMILIES["gemma2"])).soft_cap == 3
    assert head_of(tiny_model("cohere", **FAMILIES["cohere"])).scale == 0.3
    assert head_of(tiny_model("granite", **FAMILIES["granite"])).scale == 0.25
    assert head_of(tiny_model("phi", **FAMILIES["phi"])).bias_V is not None
    llama = tiny_model("llama")
    assert head_of(llama) == Head(llama.get_input_embeddings().weight)


def test_a_family_with_its_own_treatment_is_found() -> None:
    model = tiny_model("llama")
    own_forward = model.forward

    def doubled(**arguments: object) -> object:
        output = own_forward(**arguments)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    model.train()
    model.model.layers[0].eval()
    with pytest.raises(
        ValueError, match="expected the logits of llama to be its head's product .* relative difference of 5"
    ):
        check_head(model, head_of(model))
    assert model.training and not model.model.layers[0].training


@pytest.mark.parametrize("wrap", [FakeQuantizedLinear, nn.Sequential, nn.utils.parametrizations.weight_norm])
def test_a_wrapped_head_is_refused(wrap: type) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.set_output_embeddings(wrap(model.get_output_embeddings()))
    with pytest.raises(
        ValueError, match="expected a linear layer as output embedding, with its weight quantized or not, found"
    ):
        head_of(model)


def test_logits_keep_the_dtype_of_the_hidden_states() -> None:
    head = Head(torch.randn(7, 4), torch.randn(7), scale=2.0, soft_cap=3.0)
    assert head.logits(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
