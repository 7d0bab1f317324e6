"""Plans hit their targets, whatever the score, leave the model alone, and cut as if the units were masked."""

import copy
import json
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import FAMILIES, decoder_layers
from models.pruning.budget.costs import Measure, flops, parameters
from models.pruning.budget.target import Limit
from models.pruning.cut import PruningSettings, ScoreName, Targets, plan_cut, repair_cut
from models.structure.edits import Edit, apply_edit, replay
from models.structure.shape import LayerShape, WidthAxis, shape_of
from tests.helpers.masking import close, cut_model, logits, masked_logits
from tests.helpers.tiny import tiny_batch

SCORES = get_args(ScoreName)
BATCHES = [tiny_batch(), tiny_batch([("one two three four", "five six"), ("?", "!")])]
UNIFORM = PruningSettings(multiple=8)
PER_LAYER = replace(UNIFORM, allocation="per_layer")
TOGETHER = Targets(neurons=24, query_heads=2, kv_groups=2, layers=2, hidden=24)
# Three layers of 48 neurons and 8 query heads in 4 groups, 32 channels.
UNIFORM_TARGETS: list[tuple[Targets, LayerShape, int, int]] = [
    (Targets(), LayerShape(48, 8, 4), 3, 32),
    (Targets(neurons=17), LayerShape(17, 8, 4), 3, 32),
    (Targets(neurons=1), LayerShape(1, 8, 4), 3, 32),
    (Targets(kv_groups=3), LayerShape(48, 6, 3), 3, 32),
    (Targets(query_heads=4), LayerShape(48, 4, 4), 3, 32),
    (Targets(kv_groups=2, query_heads=2), LayerShape(48, 2, 2), 3, 32),
    (Targets(layers=1), LayerShape(48, 8, 4), 1, 32),
    (Targets(hidden=20), LayerShape(48, 8, 4), 3, 20),
    (TOGETHER, LayerShape(24, 2, 2), 2, 24),
    (Targets(neurons=48, query_heads=8, kv_groups=4, layers=3, hidden=32), LayerShape(48, 8, 4), 3, 32),
]


def cut(model: PreTrainedModel, edits: list[Edit]) -> PreTrainedModel:
    student = copy.deepcopy(model)
    replay(student, json.loads(json.dumps(edits)))
    return student


@pytest.mark.parametrize(("targets", "layer", "layers", "hidden"), UNIFORM_TARGETS)
@pytest.mark.parametrize("score", ["osscar", "activation"])
def test_uniform_targets_are_hit(
    score: ScoreName, targets: Targets, layer: LayerShape, layers: int, hidden: int
) -> None:
    model = cut_model("llama")
    edits = plan_cut(model, BATCHES, targets, replace(UNIFORM, score=score))
    shape = shape_of(cut(model, edits))
    assert shape.layers == (layer,) * layers
    assert shape.hidden == hidden
    assert bool(edits) == (shape != shape_of(model))


@pytest.mark.parametrize("settings", [UNIFORM, PER_LAYER])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_hits_all_targets_together(score: ScoreName, settings: PruningSettings) -> None:
    model = cut_model("llama")
    settings = replace(settings, score=score)
    student = cut(model, plan_cut(model, BATCHES, TOGETHER, settings))
    shape = shape_of(student)
    assert (len(shape.layers), shape.hidden) == (2, 24)
    assert sum(layer.neurons for layer in shape.layers) == 48
    assert sum(layer.kv_groups for layer in shape.layers) == 4
    assert all(layer.query_heads == layer.kv_groups >= 1 for layer in shape.layers)
    assert logits(student).isfinite().all()


@pytest.mark.parametrize("score", ["osscar", "magnitude"])
@pytest.mark.parametrize("neurons", [16, 24, 40])
def test_averages_over_layers_are_hit_in_multiples(score: ScoreName, neurons: int) -> None:
    """A layer that writes next to nothing is where most goes."""
    model = cut_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e-3
        model.model.layers[1].mlp.up_proj.weight *= 1e-3
    edits = plan_cut(model, BATCHES, Targets(neurons=neurons), replace(PER_LAYER, score=score))
    sizes = [layer.neurons for layer in shape_of(cut(model, edits)).layers]
    assert sum(sizes) == 3 * neurons
    assert all(size % 8 == 0 and size >= 8 for size in sizes)
    if score == "osscar":
        assert sizes[1] == max(8, 3 * neurons - 2 * 48)


@pytest.mark.parametrize("total", range(3, 13))
def test_an_average_of_groups_need_not_be_whole(total: int) -> None:
    model = cut_model("llama")
    edits = plan_cut(model, BATCHES, Targets(kv_groups=total / 3), replace(PER_LAYER, score="activation"))
    layers = shape_of(cut(model, edits)).layers
    assert sum(layer.kv_groups for layer in layers) == total
    assert all(layer.kv_groups >= 1 for layer in layers)


def test_sizes_become_multiples_where_they_were_none() -> None:
    model = cut_model("llama", intermediate_size=45)
    edits = plan_cut(model, BATCHES, Targets(neurons=24), PER_LAYER)
    sizes = [layer.neurons for layer in shape_of(cut(model, edits)).layers]
    assert all(size == 45 or size % 8 == 0 for size in sizes)
    assert 72 - 8 < sum(sizes) <= 72


@pytest.mark.parametrize("settings", [UNIFORM, PER_LAYER])
def test_targets_are_hit_by_one_event_after_the_other(settings: PruningSettings) -> None:
    """Heads alone in the second event, of layers that may have unlike numbers of groups."""
    student = cut_model("llama")
    for targets in (Targets(kv_groups=3, neurons=40), Targets(query_heads=3), Targets(neurons=24, layers=2)):
        student = cut(student, plan_cut(student, BATCHES, targets, settings))
    shape = shape_of(student)
    assert len(shape.layers) == 2
    assert sum(layer.neurons for layer in shape.layers) == 48
    assert all(layer.query_heads == layer.kv_groups for layer in shape.layers)


@pytest.mark.parametrize("settings", [UNIFORM, PER_LAYER])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_without_repair_is_the_masked_model(family: str, settings: PruningSettings) -> None:
    """Edit by edit, the same logits as with zeros in the place of what goes; the model itself stays."""
    model = cut_model(family)
    whole, modes = logits(model), [module.training for module in model.modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    edits = plan_cut(model, BATCHES, TOGETHER, settings)
    assert all(map(torch.equal, weights, model.parameters()))
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    student = copy.deepcopy(model)
    for edit in edits:
        masked = masked_logits(student, edit)
        apply_edit(student, edit)
        close(logits(student), masked)
    assert not torch.allclose(logits(student), whole, atol=0.1)
    assert torch.equal(logits(model), whole)


def test_all_masks_at_once() -> None:
    """Neurons of all layers: the dense model with zeros for those that go, in one pass."""
    model = cut_model("llama")
    edits = plan_cut(model, BATCHES, Targets(neurons=24), UNIFORM)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for edit in edits:
            gone = [n for n in range(48) if n not in edit["keep"]]
            masked.model.layers[edit["layer"]].mlp.down_proj.weight[:, gone] = 0
    close(logits(cut(model, edits)), logits(masked))


def test_plans_depend_on_the_seed_alone() -> None:
    model = cut_model("llama")
    for score in ("osscar", "random"):
        plans = [plan_cut(model, BATCHES, TOGETHER, replace(UNIFORM, score=score, seed=seed)) for seed in (0, 0, 1)]
        assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_dead_neurons_go_first() -> None:
    """And their removal changes no output."""
    model = cut_model("llama")
    dead = [3, 17, 18, 40]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[dead] = 0
    edits = plan_cut(model, BATCHES, Targets(neurons=44), UNIFORM)
    assert [edit["keep"] for edit in edits] == [[n for n in range(48) if n not in dead]] * 3
    close(logits(cut(model, edits)), logits(model))


@pytest.mark.parametrize("name", ["none", "layerwise", "sequential"])
def test_repair_is_what_the_settings_say(name: str) -> None:
    model = cut_model("llama")
    settings = replace(UNIFORM, repair=name)
    edits = plan_cut(model, BATCHES, TOGETHER, settings)
    student = cut(model, edits)
    cut_logits = logits(student)
    repair_cut(student, model, edits, BATCHES, settings)
    assert torch.equal(logits(student), cut_logits) == (name == "none")
    if name != "none":
        dense = logits(model)
        assert (logits(student) - dense).norm() < (cut_logits - dense).norm()


@pytest.mark.parametrize("axis", ["neurons", "query_heads", "kv_groups", "layers", "hidden"])
def test_a_target_leaves_something(axis: str) -> None:
    with pytest.raises(
        ValueError, match=f"expected a target of {axis} between 1 and 1,000,000,000, found 0; leave something"
    ):
        Targets(**{axis: 0})


def test_what_cannot_be_reached_is_refused() -> None:
    model = cut_model("llama")
    with pytest.raises(
        ValueError, match="expected a target of query heads that leaves as many in each of 4 .* found 6"
    ):
        plan_cut(model, BATCHES, Targets(query_heads=6), UNIFORM)
    with pytest.raises(ValueError, match="expected a target that these curves reach"):
        plan_cut(model, BATCHES, Targets(neurons=7), PER_LAYER)
    with pytest.raises(ValueError, match="expected at least one calibration batch, found none"):
        plan_cut(model, [], Targets(neurons=24), UNIFORM)


def test_depth_by_search_drops_the_block_that_does_least(batch: Batch) -> None:
    """Layers 0 and 1 change nothing."""
    model = cut_model("llama")
    with torch.no_grad():
        for index in (0, 1):
            decoder_layers(model)[index].o_proj.weight.zero_()
            decoder_layers(model)[index].down_proj.weight.zero_()
    edits = plan_cut(model, [batch], Targets(layers=1), replace(UNIFORM, depth="search"))
    assert edits == [{"op": "drop_layers", "layers": [0, 1]}]


def test_groups_that_all_layers_share_are_a_whole_number(batch: Batch) -> None:
    with pytest.raises(ValueError, match="expected a whole number of key/value groups .*, found 2.5; round it"):
        plan_cut(cut_model("llama"), [batch], Targets(kv_groups=2.5), UNIFORM)


@pytest.mark.parametrize("score", ["osscar", "activation"])
@pytest.mark.parametrize("measure", [parameters, partial(flops, batch=1, new=9)])
@pytest.mark.parametrize("axes", [["neurons"], ["neurons", "kv_groups"]])
def test_a_limit_holds_for_all_that_is_left(score: ScoreName, measure: Measure, axes: list[WidthAxis]) -> None:
    """Whatever else goes in the same cut; and giving back the last thing removed would exceed it."""
    model = cut_model("llama")
    settings = replace(PER_LAYER, score=score)
    others = [Targets(), Targets(layers=2, hidden=24)]
    others += [Targets(kv_groups=8 / 3, query_heads=3)] if axes == ["neurons"] else []
    for targets in others:
        left = shape_of(cut(model, plan_cut(model, BATCHES, targets, settings)))
        most = measure(left) - 0.6 * (
            measure(left) - measure(left.evenly(dict.fromkeys(axes, 8 if axes == ["neurons"] else 1)))
        )
        limited = replace(targets, limit=Limit(axes, measure, most))
        shape = shape_of(cut(model, plan_cut(model, BATCHES, limited, settings)))
        assert measure(shape) <= most
        assert any(
            measure(shape.keeping({(axis, index): shape.units((axis, index)) + step})) > most
            for index in range(len(shape.layers))
            for axis, step in (("neurons", 8), ("kv_groups", 1))
            if axis in axes
        )
        assert (len(shape.layers), shape.hidden) == (len(left.layers), left.hidden)
        assert all(layer.neurons % 8 == 0 and layer.query_heads % layer.kv_groups == 0 for layer in shape.layers)


def test_a_limit_takes_from_the_axis_that_costs_less() -> None:
    """Groups that write nothing go before any neuron, and neurons that write nothing before any group."""
    groups, neurons = cut_model("llama"), cut_model("llama")
    with torch.no_grad():
        for layer in groups.model.layers:
            layer.self_attn.o_proj.weight[:, 32:] *= 1e-6
        for layer in neurons.model.layers:
            layer.mlp.down_proj.weight[:, 24:] *= 1e-6
    for model, expected in ((groups, LayerShape(48, 4, 2)), (neurons, LayerShape(24, 8, 4))):
        dense = shape_of(model)
        most = parameters(dense.evenly({"neurons": expected.neurons, "kv_groups": expected.kv_groups}))
        targets = Targets(limit=Limit(["kv_groups", "neurons"], parameters, most))
        assert shape_of(cut(model, plan_cut(model, BATCHES, targets, PER_LAYER))).layers == (expected,) * 3


def test_a_limit_that_cannot_hold_is_refused() -> None:
    model = cut_model("llama")
    with pytest.raises(ValueError, match="expected a limit where sizes may differ by layer"):
        plan_cut(model, BATCHES, Targets(limit=Limit(["neurons"], parameters, 1e4)), UNIFORM)
    with pytest.raises(ValueError, match="expected a limit .* no target of query heads if it is on their groups"):
        plan_cut(model, BATCHES, Targets(query_heads=4, limit=Limit(["kv_groups"], parameters, 1e4)), PER_LAYER)
    with pytest.raises(ValueError, match="expected a target that these curves reach"):
        plan_cut(model, BATCHES, Targets(limit=Limit(["neurons"], parameters, 1e3)), PER_LAYER)


@pytest.mark.parametrize("settings", [UNIFORM, PER_LAYER])
def test_targets_that_are_met_collect_no_statistics(settings: PruningSettings) -> None:
    model = cut_model("llama")
    targets = Targets(neurons=24, kv_groups=2)
    student = cut(model, plan_cut(model, BATCHES, targets, settings))
    assert plan_cut(student, [], targets, settings) == []  # with statistics, no batch would be an error


def test_local_search_changes_what_is_kept_and_not_how_many() -> None:
    """On weights and inputs where greedy does not find the best pair."""
    model = cut_model("llama")
    ranked = plan_cut(model, BATCHES, Targets(neurons=12), UNIFORM)
    searched = plan_cut(model, BATCHES, Targets(neurons=12), replace(UNIFORM, swaps=100))
    assert [len(edit["keep"]) for edit in searched] == [len(edit["keep"]) for edit in ranked] == [12, 12, 12]
    assert searched != ranked


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"swaps": -1}, "expected swaps between 0 and"),
        ({"ridge": float("nan")}, "expected ridge between 0 and"),
        ({"score": None}, "expected a value for score, found null"),
        ({"swaps": 1, "score": "taylor"}, "expected swaps only with the score osscar"),
        ({"swaps": 1, "allocation": "per_layer"}, "expected swaps only with the score osscar"),
    ],
)
def test_settings_out_of_range_and_swaps_that_would_do_nothing_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningSettings(**wrong)
