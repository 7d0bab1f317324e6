"""What rounding explains: as large as real float16 arithmetic is, in every layer, and no larger than a few times that."""

import copy

import pytest
import torch
from torch import nn

from export.verify.checks import distances
from export.verify.rounding import FLOAT16, FLOAT32, explained_by_rounding
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model

PROMPTS = left_padded_prompts()
IDS, MASK = PROMPTS["prompt_ids"], PROMPTS["prompt_mask"]


def test_it_is_of_the_size_of_real_rounding():
    """Each product of a model in float16, fed with the float32 model's values, against the float32 products."""
    model = tiny_model()
    explained = explained_by_rounding(model, IDS, MASK, FLOAT16)
    reads: dict = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: reads.__setitem__(name, inputs[0]))
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                half = copy.deepcopy(module).half()
                half._forward_pre_hooks.clear()
                ours, theirs = half(reads[name].half()), module(reads[name])
                found = float(distances(ours[MASK.bool()], theirs[MASK.bool()]).amax())
                assert 0.1 * explained[f"{name} gives"] < found < explained[f"{name} gives"], name


def test_every_place_has_a_figure_and_the_unit_scales_it():
    model = quantized(tiny_model(layers=2), kv_cache="int8")
    half, single = (explained_by_rounding(model, IDS, MASK, arithmetic) for arithmetic in (FLOAT16, FLOAT32))
    assert half.keys() == single.keys()
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name in projections:
        part = "mlp" if name in projections[4:] else "self_attn"
        assert f"model.layers.1.{part}.{name} reads" in half and f"model.layers.1.{part}.{name} gives" in half
    assert {
        "lm_head reads",
        "lm_head gives",
        "present.1.key",
        "model.layers.1.self_attn.cache_quantizer.key reads",
    } <= set(half)
    name = "model.layers.0.self_attn.q_proj reads"  # no product lies before it, whose sum has float32's errors in both
    # Drawn errors of u^2 each; in float32 both passes have their own beside them, of u^2 / 3.
    assert half[name] / single[name] == pytest.approx(2**13 / (1 + 2 / 3) ** 0.5, rel=0.35)
    assert half["present.1.key"] == 0  # codes of what was fed


def test_it_draws_the_same_again_and_leaves_the_model_alone():
    model = quantized(tiny_model(layers=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (explained_by_rounding(model, IDS, MASK, FLOAT16) for _ in range(2))
    assert first == second
    assert model.config._attn_implementation != "eager"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_errors_add_up_on_the_residual_stream_only():
    """Fed layers hand on no more than what each of them adds; a layer by itself starts from an exact stream."""
    model = tiny_model(layers=3)
    together, alone = (
        explained_by_rounding(model, IDS, MASK, FLOAT16),
        explained_by_rounding(model, IDS, MASK, FLOAT16, layers={2}),
    )
    assert set(alone) < set(together) and all(".2." in name for name in alone)
    name = "model.layers.2.self_attn.o_proj reads"
    assert alone[name] == pytest.approx(together[name], rel=0.5)
