"""What modules remember of their sizes; and the config of a layer whose forward reads it."""

import copy

import pytest

from export.onnx_graph.layer_kinds import slice_layers
from models.architecture import decoder_layers
from models.structure.edits import apply_edit
from models.structure.sizes import LayerConfig
from tests.helpers.masking import CUTS, cut_model, logits
from tests.helpers.tiny_models import is_uniform


def test_a_layers_config_is_the_models_but_for_its_heads() -> None:
    model = cut_model("phi3")
    config = LayerConfig(model.config, 3)
    assert config.num_attention_heads == 3
    assert config.rms_norm_eps == model.config.rms_norm_eps
    model.set_attn_implementation("eager")
    assert config._attn_implementation == "eager"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = config.nonsense


def test_copies_refer_to_the_copied_models_config() -> None:
    """Also where the copy is given another one, as slices of a model are."""
    model = cut_model("phi3")
    apply_edit(model, CUTS["heads"])
    duplicate = copy.deepcopy(model)
    assert all(layer.attention.config.config is duplicate.config for layer in decoder_layers(duplicate))
    assert duplicate.config is not model.config
    part = slice_layers(model, [1])
    (layer,) = decoder_layers(part)
    assert layer.attention.config.config is part.config
    assert (layer.attention.config.num_attention_heads, part.config.num_attention_heads) == (4, 8)
    assert logits(part).isfinite().all()


@pytest.mark.parametrize("cut", ["neurons", "groups", "heads"])
def test_layers_of_different_sizes_are_not_uniform(cut: str) -> None:
    model = cut_model("gemma3_text")
    assert is_uniform(model)
    apply_edit(model, CUTS[cut])
    assert not is_uniform(model)
    config = model.config  # the largest, until all agree
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (48, 8, 4)


@pytest.mark.parametrize("cut", ["channels", "layer"])
def test_what_all_layers_share_stays_uniform(cut: str) -> None:
    model = cut_model("qwen3")
    apply_edit(model, CUTS[cut])
    assert is_uniform(model)
