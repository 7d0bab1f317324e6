"""Descriptions of families: every view agrees with the modules, whatever their names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from models.architecture import FAMILIES, check_family, count_parameters, decoder_layers
from models.structure.edits import apply_edit
from models.structure.shape import shape_of
from tests.helpers.masking import cut_model
from tests.helpers.tiny import tiny_model

families = pytest.mark.parametrize("family", FAMILIES)
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@families
def test_sizes(family: str) -> None:
    layers = decoder_layers(cut_model(family))
    assert [layer.index for layer in layers] == [0, 1, 2]
    for layer in layers:
        assert (layer.num_neurons, layer.num_query_heads, layer.num_kv_groups, layer.head_dim) == (48, 8, 4, 8)


@families
def test_linears_are_named_in_the_order_of_the_data(family: str) -> None:
    fused = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    layer = decoder_layers(cut_model(family))[0]
    assert [name for _, name in layer.linears()] == (fused if family == "phi3" else SEPARATE)
    assert all(isinstance(getattr(owner, name), torch.nn.Linear) for owner, name in layer.linears())


@families
def test_parts_cover_what_their_layers_give(family: str) -> None:
    layer = decoder_layers(cut_model(family))[1]
    heads, groups = (64, 32), (32, 32)
    assert [part.weight.shape for part in (layer.queries, layer.keys, layer.values)] == [heads, groups, groups]
    assert [part.weight.shape for part in (layer.gate, layer.up)] == [(48, 32), (48, 32)]
    starts = [part.start for part in (layer.queries, layer.keys, layer.values, layer.gate, layer.up)]
    assert starts == ([0, 64, 96, 0, 48] if family == "phi3" else [0] * 5)


def test_stacked_parts_are_what_forward_takes_them_for() -> None:
    """No values: attention gives nothing.  No gate: the MLP gives nothing.  No keys: attention is the same for all queries."""
    model = cut_model("phi3")
    layer, x_BTD = decoder_layers(model)[0], torch.randn(2, 3, 32)
    with torch.no_grad():
        turn = model.model.rotary_emb(x_BTD, torch.arange(3)[None])
        attended = layer.attention(x_BTD, turn, None)[0]
        layer.keys.weight.zero_()
        without_keys = layer.attention(x_BTD, turn, None)[0]
        layer.queries.weight.normal_()
        assert torch.equal(layer.attention(x_BTD, turn, None)[0], without_keys)
        layer.values.weight.zero_()
        assert not layer.attention(x_BTD, turn, None)[0].any()
        assert not torch.allclose(attended, without_keys)
        layer.gate.weight.zero_()
        assert not layer.mlp(x_BTD).any()


@families
def test_norms_are_told_apart_by_what_reaches_them(family: str) -> None:
    """A stream norm reads what the layer was given or has added to it; an output norm what a projection gives."""
    model = cut_model(family)
    layer = decoder_layers(model)[0]
    read: dict[Any, torch.Tensor] = {}
    written: list[torch.Tensor] = []
    for norm in (*layer.stream_norms, *layer.output_norms):
        norm.register_forward_pre_hook(lambda module, inputs: read.update({module: inputs[0]}))
    for projection in (layer.o_proj, layer.down_proj):
        projection.register_forward_hook(lambda module, inputs, output: written.append(output))
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    assert [torch.equal(read[norm], y) for norm, y in zip(layer.output_norms, written, strict=False)] == (
        [True, True] if layer.output_norms else []
    )
    assert len(layer.stream_norms) == 2
    assert not any(torch.equal(read[norm], y) for norm in layer.stream_norms for y in written)
    sized = [m for m in layer.block.modules() if "Norm" in type(m).__name__ and m.weight.numel() == 32]
    assert set(sized) == {*layer.stream_norms, *layer.output_norms}


# Unknown families ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [decoder_layers, shape_of, lambda model: check_family(model.config)])
def test_unknown_family_is_refused(use: Callable[[PreTrainedModel], Any]) -> None:
    model = tiny_model("gpt2", n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(
        ValueError,
        match="expected a model of one of the families llama, .* found model_type 'gpt2'; .* norms on the residual",
    ) as caught:
        use(model)
    assert "\n" not in str(caught.value)


def test_a_multimodal_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        ValueError, match="found the multimodal model_type 'gemma3'; save its language model as a folder"
    ):
        check_family(AutoConfig.for_model("gemma3"))


# Counting -----------------------------------------------------------------------------------------------------------


def test_tied_embeddings_count_once() -> None:
    tied, untied = tiny_model(), tiny_model(tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == 300 * 32
    # embedding, final norm, and per layer: norms, q and o, k and v, three MLP matrices
    assert count_parameters(tied) == 300 * 32 + 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)


def test_pruning_lowers_the_count(model: PreTrainedModel) -> None:
    before = count_parameters(model)
    apply_edit(model, {"op": "narrow_mlp", "layer": 0, "keep": list(range(20))})
    assert before - count_parameters(model) == 3 * 32 * 28
    apply_edit(model, {"op": "narrow_hidden", "keep": list(range(16))})
    apply_edit(model, {"op": "drop_layers", "layers": [1]})
    assert count_parameters(model) == 300 * 16 + 16 + 2 * 16 + 2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 20
