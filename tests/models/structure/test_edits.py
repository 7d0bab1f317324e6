"""Edits as a list: applied, replayed, trained across; quantizers; and what is refused.  Cuts themselves: `test_layers.py`."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from datamodules.collate import Batch
from models.architecture import count_parameters, decoder_layers
from models.quantization import FakeQuantizedLinear, freeze_scales, quantized_linears
from models.quantization.learned_scales import learned_scales, round_learned_scales
from models.structure.edits import Edit, apply_edit, quantize_decoder, replay
from tests.helpers.masking import logits
from tests.helpers.tiny import tiny_model
from tests.helpers.tiny_models import is_uniform

NEURONS = sorted({0, 3, *range(10, 40, 2)})
EDITS: list[Edit] = [
    {"op": "narrow_mlp", "layer": 0, "keep": NEURONS},
    {"op": "narrow_mlp", "layer": 1, "keep": [47 - n for n in reversed(NEURONS)]},
    {"op": "narrow_kv_groups", "layer": 0, "keep": [1]},
    {"op": "narrow_kv_groups", "layer": 1, "keep": [0]},
    {"op": "narrow_mlp", "layer": 0, "keep": list(range(1, 17))},
    {"op": "narrow_mlp", "layer": 1, "keep": list(range(16))},
]
QUANTIZE: Edit = {
    "op": "fake_quantize",
    "format": "fp8_e4m3",
    "modules": [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")],
}


def observe_and_freeze(model: PreTrainedModel) -> None:
    logits(model.train())
    freeze_scales(model.eval())


# Identity and training ----------------------------------------------------------------------------------------------


def test_parameters_stay_the_same_objects(model: PreTrainedModel) -> None:
    before = {name: (id(parameter), parameter) for name, parameter in model.named_parameters()}
    replay(model, [*EDITS, QUANTIZE])
    after = {name: (id(parameter), parameter) for name, parameter in model.named_parameters()}
    assert {name: number for name, (number, _) in before.items()} == {
        name: number for name, (number, _) in after.items()
    }


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    optimizer.zero_grad()
    loss = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def test_training_goes_on_across_edits(model: PreTrainedModel, batch: Batch) -> None:
    """Moments of kept rows are bit-identical, counters go on, every parameter still belongs to the optimizer and learns."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    losses = [train_step(model, optimizer, batch) for _ in range(5)]
    scheduler.step()
    layer = decoder_layers(model)[0]
    weights = {"up": layer.mlp.up_proj.weight, "down": layer.mlp.down_proj.weight, "k": layer.attention.k_proj.weight}
    weights["o"] = layer.attention.o_proj.weight
    untouched = decoder_layers(model)[1].mlp.up_proj.weight
    before = copy.deepcopy({name: optimizer.state[weight] for name, weight in weights.items()})
    untouched_before = copy.deepcopy(optimizer.state[untouched])
    data = {name: weight.detach().clone() for name, weight in weights.items()}

    apply_edit(model, {"op": "narrow_mlp", "layer": 0, "keep": NEURONS}, [optimizer])
    apply_edit(model, {"op": "narrow_kv_groups", "layer": 0, "keep": [1]}, [optimizer])

    neurons, rows, columns = torch.tensor(NEURONS), torch.arange(8, 16), torch.arange(16, 32)
    kept = {"up": (0, neurons), "down": (1, neurons), "k": (0, rows), "o": (1, columns)}
    for name, (dim, indices) in kept.items():
        assert torch.equal(weights[name], data[name].index_select(dim, indices))
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = before[name][moment].index_select(dim, indices)
            assert expected.abs().max() > 0
            assert torch.equal(optimizer.state[weights[name]][moment], expected)
        assert optimizer.state[weights[name]]["step"] == 5
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[untouched][moment], untouched_before[moment])

    losses += [train_step(model, optimizer, batch) for _ in range(15)]
    assert losses[-1] < losses[5] / 2
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(optimizer.state[p]["step"] == 20 for p in model.parameters())
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


# Config, folders, replay --------------------------------------------------------------------------------------------


def test_config_follows_the_layers(model: PreTrainedModel) -> None:
    apply_edit(model, EDITS[0])
    assert not is_uniform(model)
    assert model.config.intermediate_size == 48  # the largest, until all agree
    apply_edit(model, EDITS[1])
    assert is_uniform(model)
    assert model.config.intermediate_size == len(NEURONS)
    apply_edit(model, EDITS[2])
    assert not is_uniform(model)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    apply_edit(model, EDITS[3])
    assert is_uniform(model)
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    layer = decoder_layers(model)[0]
    assert (layer.mlp.up_proj.out_features, layer.mlp.down_proj.in_features) == (len(NEURONS), len(NEURONS))
    assert (layer.attention.q_proj.out_features, layer.attention.o_proj.in_features) == (16, 16)


def test_folder_round_trip_where_the_head_width_was_implied(tmp_path: Path) -> None:
    """Qwen2's config names no head width: hidden size over heads, until heads are cut."""
    model = tiny_model("qwen2")
    del model.config.head_dim
    replay(model, EDITS)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_replay_rebuilds_the_student(family: str) -> None:
    """What a checkpoint does: edits through JSON onto another random model, then the weights."""
    student, fresh = tiny_model(family, seed=1), tiny_model(family, seed=2)
    edits = [*EDITS[:5], QUANTIZE]  # layers of different sizes
    replay(student, edits)
    observe_and_freeze(student)
    replay(fresh, json.loads(json.dumps(edits)))
    fresh.load_state_dict(student.state_dict())
    assert torch.equal(logits(fresh), logits(student))
    assert all(linear.weight_quantizer.frozen for linear in quantized_linears(fresh).values())
    assert not is_uniform(fresh)


def test_replay_rebuilds_learned_scales() -> None:
    """Scales that have moved and their logarithms; the order of parameters is that of the student in training."""
    student, fresh = tiny_model(seed=1), tiny_model(seed=2)
    for edit in (QUANTIZE, {"op": "learn_scales", "weights_follow": False}):
        apply_edit(student, edit)
        if edit is QUANTIZE:
            observe_and_freeze(student)
    with torch.no_grad():
        for parameter in learned_scales(student):
            parameter.add_(0.3)
    round_learned_scales(student)
    replay(fresh, [QUANTIZE, {"op": "learn_scales", "weights_follow": False}])
    fresh.load_state_dict(student.state_dict())
    assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in student.named_parameters()]
    assert torch.equal(logits(fresh), logits(student))
    assert count_parameters(fresh) == count_parameters(tiny_model())


# Quantizers ---------------------------------------------------------------------------------------------------------


def test_fake_quantize_observes_then_rounds(model: PreTrainedModel) -> None:
    before, names = logits(model), set(QUANTIZE["modules"])
    apply_edit(model, QUANTIZE)
    assert set(quantized_linears(model)) == names
    assert torch.equal(logits(model), before)  # observing changes nothing
    observe_and_freeze(model)
    difference = (logits(model) - before).abs().max()
    assert 0 < difference < 3


def test_quantize_decoder_names_every_projection(model: PreTrainedModel) -> None:
    edit = quantize_decoder(model)
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert edit["modules"] == [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in parts]
    apply_edit(model, json.loads(json.dumps(edit)))
    assert list(quantized_linears(model)) == edit["modules"]
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_a_quantized_model_can_still_be_narrowed(model: PreTrainedModel) -> None:
    replay(model, [QUANTIZE, EDITS[0], EDITS[2]])
    assert isinstance(decoder_layers(model)[0].mlp.up_proj, FakeQuantizedLinear)
    assert decoder_layers(model)[0].mlp.up_proj.out_features == len(NEURONS)
    assert torch.isfinite(logits(model)).all()


# Bad input ----------------------------------------------------------------------------------------------------------

BAD: list[tuple[Edit, str]] = [
    ({"op": "shrink"}, r"expected an edit with an 'op' among narrow_mlp, .*, lora, found 'shrink'"),
    ({}, "found None"),
    ({"op": "narrow_mlp", "keep": [0]}, "expected narrow_mlp with the fields layer, keep, found keep;"),
    ({"op": "drop_layers"}, "expected drop_layers with the fields layers, found none;"),
    (
        {"op": "narrow_hidden", "layer": 0, "keep": [0]},
        "expected narrow_hidden with the fields keep, found layer, keep;",
    ),
    ({"op": "narrow_mlp", "layer": 2, "keep": [0]}, "expected a layer from 0 to 1, found 2"),
    (
        {**QUANTIZE, "format": "fp4"},
        "expected a quantization format among fp8_e4m3, fp8_e4m3_per_channel, int8, int8_static, int8_weight_only, "
        "int8_g32, int8_g64, int8_g128, int4_g32, int4_g64, int4_g128, int4_g32_zp, int4_g64_zp, int4_g128_zp, found 'fp4'",
    ),
    (
        {**QUANTIZE, "modules": ["model.layers.0.mlp.up_proj", "model.layers.7.mlp.up_proj"]},
        "'model.layers.7.mlp.up_proj'",
    ),
    ({**QUANTIZE, "modules": ["model.layers.0.mlp.sideways"]}, "'model.layers.0.mlp.sideways'"),
    ({**QUANTIZE, "modules": ["model.norm"]}, "'model.norm'"),
    (
        {"op": "learn_scales", "weights_follow": False},
        "expected quantized layers whose scales are not learned yet, found 0 scales of weights",
    ),
    ({"op": "learn_scales", "modules": []}, "expected learn_scales with the fields weights_follow, found modules;"),
]


@pytest.mark.parametrize(("edit", "message"), BAD)
def test_bad_edits_name_what_is_wrong_and_change_nothing(model: PreTrainedModel, edit: Edit, message: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        apply_edit(model, edit)
    assert_one_sentence(str(caught.value))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def assert_one_sentence(message: str) -> None:
    """What was expected, what was found, how to mend it."""
    assert message.startswith("expected ")
    assert "found" in message
    assert ";" in message
    assert "\n" not in message


def test_quantizing_twice_is_refused(model: PreTrainedModel) -> None:
    apply_edit(model, QUANTIZE)
    observe_and_freeze(model)
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.q_proj'"):
        apply_edit(model, QUANTIZE)
    assert all(linear.input_quantizer.frozen for linear in quantized_linears(model).values())
