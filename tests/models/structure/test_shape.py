"""Shapes: read from models, made smaller, and turned into models again."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.architecture import FAMILIES
from models.structure.shape import Key, LayerShape, levels, shape_of, sliced
from tests.helpers.masking import cut_model, logits
from tests.helpers.tiny import tiny_model

KEPT: dict[Key, int] = {
    ("neurons", 0): 16,
    ("neurons", 2): 40,
    ("query_heads", 0): 4,
    ("kv_groups", 0): 3,
    ("kv_groups", 2): 1,
}
LAYERS = (LayerShape(16, 3, 3), LayerShape(48, 8, 4), LayerShape(40, 2, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sliced_model_has_the_shape_and_runs(family: str) -> None:
    """Neurons, groups and heads uneven over the layers, and channels."""
    model = cut_model(family)
    before = logits(model)
    shape = shape_of(model).keeping(KEPT | {("hidden", 0): 24})
    assert shape.layers == LAYERS
    assert shape.hidden == 24
    student = sliced(model, shape)
    assert shape_of(student) == shape
    assert logits(student).isfinite().all()
    assert torch.equal(logits(model), before)


def test_layers_go_and_the_others_move_up() -> None:
    model = cut_model("llama")
    shape = shape_of(model).keeping({("layer", 1): 0, ("neurons", 2): 8})
    assert [layer.neurons for layer in shape.layers] == [48, 8]
    assert shape_of(sliced(model, shape)) == shape


def test_first_units_are_kept() -> None:
    model = tiny_model()
    student = sliced(model, shape_of(model).keeping({("neurons", 1): 16}))
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight[:16])


def test_a_config_alone_gives_the_shape() -> None:
    model = tiny_model("qwen3", tie_word_embeddings=False)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert shape_of(empty) == shape_of(model)


def test_a_shape_larger_than_the_model_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="narrow_mlp to keep neurons of layer 1 .* found 49"):
        sliced(model, shape_of(model).keeping({("neurons", 1): 49}))


def test_units_by_key() -> None:
    shape = shape_of(tiny_model()).keeping({("neurons", 1): 40})
    keys: list[Key] = [
        ("neurons", 0),
        ("neurons", 1),
        ("query_heads", 0),
        ("kv_groups", 0),
        ("layer", 1),
        ("hidden", 0),
    ]
    assert [shape.units(key) for key in keys] == [48, 40, 4, 2, 1, 32]


@pytest.mark.parametrize(
    ("total", "multiple", "least", "expected"),
    [
        (64, 16, 1, [64, 48, 32, 16]),
        (64, 16, 32, [64, 48, 32]),
        (64, 16, 40, [64, 48]),
        (50, 16, 1, [50, 48, 32, 16]),
        (10, 16, 1, [10]),
        (3, 1, 1, [3, 2, 1]),
    ],
)
def test_levels(total: int, multiple: int, least: int, expected: list[int]) -> None:
    assert levels(total, multiple, least) == expected


def test_layers_keep_at_most_so_much() -> None:
    shape = shape_of(tiny_model()).keeping({("neurons", 1): 20})
    assert shape.evenly({"neurons": 24}).layers == (LayerShape(24, 4, 2), LayerShape(20, 4, 2))
    assert set(shape.evenly({"neurons": 16, "kv_groups": 1}).layers) == {LayerShape(16, 2, 1)}
    assert shape.evenly({"neurons": 48, "kv_groups": 2}) == shape
    assert (shape.widest("neurons"), shape.widest("kv_groups")) == (48, 2)
