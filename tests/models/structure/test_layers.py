"""Cuts along every axis in every family: the function of the masked model, the same parameters, and training that goes on."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.architecture import FAMILIES, decoder_layers
from models.quantization import freeze_scales
from models.structure.edits import Edit, apply_edit, quantize_decoder, replay
from tests.helpers.masking import CUTS, close, cut_model, logits, masked_logits
from tests.helpers.tiny import tiny_batch
from tests.helpers.tiny_models import is_uniform

# All axes in one student; layers differ where they can.
MIXED = [CUTS["neurons"], CUTS["heads"], CUTS["groups"], CUTS["channels"], CUTS["layer"]]
# Both layers alike, and every size another.
UNIFORM: list[Edit] = [
    {"op": "drop_layers", "layers": [0]},
    *({"op": "narrow_mlp", "layer": layer, "keep": list(range(layer, 40))[:30]} for layer in (0, 1)),
    *({"op": "narrow_kv_groups", "layer": layer, "keep": [layer, 2]} for layer in (0, 1)),
    *({"op": "narrow_query_heads", "layer": layer, "keep": [1, 2 + layer]} for layer in (0, 1)),
    CUTS["channels"],
]

families = pytest.mark.parametrize("family", FAMILIES)
cuts = pytest.mark.parametrize("cut", CUTS)


# The same function as masking ---------------------------------------------------------------------------------------


@cuts
@families
def test_a_cut_equals_the_masked_model(family: str, cut: str) -> None:
    model = cut_model(family)
    expected = masked_logits(model, CUTS[cut])
    assert (expected - logits(model)).abs().max() > 0.1, "the mask changes nothing, so this test shows nothing"
    apply_edit(model, CUTS[cut])
    close(logits(model), expected)


@cuts
def test_biases_everywhere(cut: str) -> None:
    """Those of o_proj and down_proj stay with the hidden size, the others follow the units."""
    model = cut_model("llama", mlp_bias=True, attention_bias=True, tie_word_embeddings=False)
    expected = masked_logits(model, CUTS[cut])
    apply_edit(model, CUTS[cut])
    close(logits(model), expected)


@families
def test_cuts_follow_one_another(family: str) -> None:
    """Each against the masked model that the one before has left."""
    model = cut_model(family)
    for edit in MIXED:
        expected = masked_logits(model, edit)
        apply_edit(model, edit)
        close(logits(model), expected)


@families
def test_keeping_all_changes_nothing(family: str) -> None:
    model = cut_model(family)
    before = logits(model)
    replay(model, [{**CUTS["neurons"], "keep": list(range(48))}, {**CUTS["groups"], "keep": list(range(4))}])
    replay(model, [{**CUTS["heads"], "keep": list(range(8))}, {**CUTS["channels"], "keep": list(range(32))}])
    close(logits(model), before)


@cuts
def test_quantized_students_are_cut_on_the_same_grid(cut: str) -> None:
    model = cut_model("gemma2")
    apply_edit(model, quantize_decoder(model))
    logits(model.train())
    freeze_scales(model.eval())
    expected = masked_logits(model, CUTS[cut])
    apply_edit(model, CUTS[cut])
    # A value on the border between two steps of the grid may fall to either side.
    assert (logits(model) - expected).abs().mean() < 0.01 < (logits(model) - expected.roll(1, 0)).abs().mean()


# Identity and training ----------------------------------------------------------------------------------------------


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    batch = tiny_batch()
    optimizer.zero_grad()
    model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss.backward()
    optimizer.step()


@cuts
@families
def test_parameters_and_optimizer_go_on(family: str, cut: str) -> None:
    """Moments that equal their weights before the cut equal them bit for bit after it, so both kept the same rows."""
    model = cut_model(family, tie_word_embeddings=family != "qwen3")
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0)
    train_step(model, optimizer)
    for parameter in model.parameters():
        optimizer.state[parameter]["exp_avg"] = parameter.detach().clone()
    parameters = {id(parameter) for parameter in model.parameters()}
    apply_edit(model, CUTS[cut], [optimizer])
    left = list(model.named_parameters())
    assert {id(parameter) for _, parameter in left} <= parameters
    (group,) = optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for _, parameter in left]
    assert len(group["param_names"]) == len(left) == len(optimizer.state)
    for name, parameter in left:
        state = optimizer.state[parameter]
        assert state["step"] == 1
        assert state["exp_avg_sq"].shape == parameter.shape
        if cut != "channels" or parameter.ndim > 1:  # gains of norms are weights that this cut changes
            assert torch.equal(state["exp_avg"], parameter), name
    before = {name: parameter.detach().clone() for name, parameter in left}
    train_step(model, optimizer)
    assert [name for name, parameter in left if torch.equal(parameter, before[name])] == []


def test_moments_of_norms_are_cut_and_not_scaled() -> None:
    model = cut_model("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer)
    norm, keep = model.model.norm.weight, torch.tensor(CUTS["channels"]["keep"])
    before = copy.deepcopy(optimizer.state[norm])
    apply_edit(model, CUTS["channels"], [optimizer])
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[norm][moment], before[moment][keep])


def test_a_checkpoint_resumes_after_layers_are_dropped() -> None:
    """The optimizer of a rebuilt student numbers its parameters as the one that was cut does."""
    model, fresh = cut_model("qwen2"), cut_model("qwen2", seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_step(model, optimizer)
    apply_edit(model, CUTS["layer"], [optimizer])
    apply_edit(fresh, CUTS["layer"])
    fresh.load_state_dict(model.state_dict())
    again = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_step(model, optimizer)
    train_step(fresh, again)
    assert torch.equal(logits(fresh), logits(model))


# Config, folders, replay --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@families
def test_folder_round_trip(family: str, tied: bool, tmp_path: Path) -> None:
    model = cut_model(family, tie_word_embeddings=tied)
    replay(model, UNIFORM)
    assert is_uniform(model)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    layer, config = decoder_layers(again)[1], again.config
    assert (layer.num_neurons, layer.num_query_heads, layer.num_kv_groups, layer.head_dim) == (30, 2, 2, 8)
    assert (config.hidden_size, config.num_hidden_layers) == (24, 2)


@families
def test_replay_rebuilds_the_student(family: str) -> None:
    """What a checkpoint does: edits through JSON onto another random model, then the weights."""
    student, fresh = cut_model(family, seed=1), cut_model(family, seed=2)
    replay(student, MIXED)
    assert not is_uniform(student)
    replay(fresh, json.loads(json.dumps(MIXED)))
    fresh.load_state_dict(student.state_dict())
    assert torch.equal(logits(fresh), logits(student))


@families
def test_copies_of_a_cut_student(family: str) -> None:
    model = cut_model(family)
    replay(model, MIXED)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def attributes(module: nn.Module, name: str) -> set[int]:
    return {getattr(part, name) for part in module.modules() if hasattr(part, name)}


@families
def test_all_sizes_are_true_after_cuts(family: str) -> None:
    model = cut_model(family)
    replay(model, UNIFORM)
    for linear in (part for part in model.modules() if isinstance(part, nn.Linear)):
        assert (linear.out_features, linear.in_features) == linear.weight.shape
    assert attributes(model, "hidden_size") <= {24}
    assert attributes(model, "intermediate_size") <= {30}
    assert attributes(model, "embedding_dim") == {24}
    assert attributes(model, "num_key_value_groups") == {1}
    assert attributes(model, "layer_idx") == {0, 1}


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_layers_keep_their_kind_of_attention(family: str) -> None:
    model = cut_model(family)
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    apply_edit(model, {"op": "drop_layers", "layers": [0]})
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.attention.layer_type for layer in decoder_layers(model)] == model.config.layer_types


# Bad input ----------------------------------------------------------------------------------------------------------

BAD: list[tuple[Edit, str]] = [
    ({**CUTS["neurons"], "keep": []}, "narrow_mlp to keep neurons of layer 1 by 1 to 48 distinct .* found 0 "),
    ({**CUTS["neurons"], "keep": [0, 48]}, "indices below 48, found 2 .* and .48.;"),
    ({**CUTS["neurons"], "keep": [-1, 3]}, "found 2 with the ends .-1."),
    ({**CUTS["neurons"], "keep": [3, 3]}, "distinct"),
    ({**CUTS["neurons"], "keep": [4, 3]}, "ascending"),
    ({**CUTS["neurons"], "layer": 3}, "expected a layer from 0 to 2, found 3"),
    ({**CUTS["groups"], "layer": -1}, "expected a layer from 0 to 2, found -1"),
    ({**CUTS["groups"], "keep": [4]}, "narrow_kv_groups to keep key/value groups of layer 0 by 1 to 4"),
    ({**CUTS["heads"], "keep": [8]}, "narrow_query_heads to keep query heads of layer 1 by 1 to 8"),
    ({**CUTS["heads"], "keep": [0, 1]}, r"in each of the 4 groups of layer 1, found \[2, 0, 0, 0\]"),
    ({**CUTS["heads"], "keep": [0, 2, 4, 5, 6]}, r"found \[1, 1, 2, 1\]"),
    ({**CUTS["channels"], "keep": [32]}, "narrow_hidden to keep channels of the residual stream by 1 to 32"),
    ({"op": "drop_layers", "layers": []}, "drop_layers to remove decoder layers by 1 to 3"),
    ({"op": "drop_layers", "layers": [3]}, "drop_layers to remove decoder layers by 1 to 3"),
    ({"op": "drop_layers", "layers": [0, 1, 2]}, "to leave a decoder layer, found all 3 listed"),
]


@pytest.mark.parametrize(("edit", "message"), BAD)
def test_bad_cuts_name_what_is_wrong_and_change_nothing(edit: Edit, message: str) -> None:
    model = cut_model("phi3")
    before, config = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    with pytest.raises(ValueError, match=message) as caught:
        apply_edit(model, edit)
    text = str(caught.value)
    assert text.startswith("expected ")
    assert ", found " in text
    assert ";" in text
    assert "\n" not in text
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config
