"""Formats by patterns, and by sensitivity under a budget of bits."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from models.forward import answer_logits
from models.losses import forward_kl
from models.post_training.format_choice import (
    format_costs,
    formats_by_pattern,
    formats_by_sensitivity,
    quantization_edits,
)
from models.quantization import freeze_scales, quantized_linears
from models.structure.edits import replay
from tests.helpers.tiny import tiny_batch, tiny_model


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model().eval()


def test_the_last_pattern_that_fits_decides(model: PreTrainedModel) -> None:
    formats = formats_by_pattern(model, "int4_g32", {"*.down_proj": "int8_g32", "model.layers.0.*": "none"})
    assert formats["model.layers.0.mlp.down_proj"] == "none"
    assert formats["model.layers.1.mlp.down_proj"] == "int8_g32"
    assert formats["model.layers.1.self_attn.q_proj"] == "int4_g32"
    replay(model, quantization_edits(formats))
    linears = quantized_linears(model)
    assert {name: linear.format for name, linear in linears.items()} == {
        n: f for n, f in formats.items() if f != "none"
    }


def test_patterns_and_formats_that_do_not_exist(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"found 'down', which fits none of 14 such as model\.layers\.0"):
        formats_by_pattern(model, "int4_g32", {"down": "int8_g32"})
    with pytest.raises(ValueError, match=r"a quantization format among .*, found 'int3'"):
        formats_by_pattern(model, "int4_g32", {"*": "int3"})


def test_fewer_bits_cost_more(model: PreTrainedModel) -> None:
    batch = tiny_batch()
    costs = format_costs(model, [batch], ["int4_g32", "int8_g32", "none"])
    assert len(costs) == 14
    for cost in costs.values():
        assert 0 == cost["none"] < cost["int8_g32"] < cost["int4_g32"]


def test_costs_rank_layers_as_the_measured_divergence_does(model: PreTrainedModel) -> None:
    batch = tiny_batch()
    costs = format_costs(model, [batch], ["int4_g32"])
    dense = answer_logits(model, batch).detach()
    measured = {}
    for name in costs:
        part = copy.deepcopy(model)
        replay(part, quantization_edits({name: "int4_g32"}))
        freeze_scales(part)
        measured[name] = float(forward_kl(answer_logits(part, batch).detach(), dense).mean())
    ours = torch.tensor([costs[name]["int4_g32"] for name in costs]).log()
    theirs = torch.tensor([measured[name] for name in costs]).log()
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.5


def test_a_budget_is_kept_and_more_bits_cost_less(model: PreTrainedModel) -> None:
    batch, candidates = tiny_batch(), ["none", "int4_g32", "int8_g32"]
    sizes = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    costs = format_costs(model, [batch], candidates)
    bits = {"int4_g32": 4.5, "int8_g32": 8.5, "none": 16.0}
    last = float("inf")
    for budget in (4.5, 6.0, 9.0, 16.0):
        chosen = formats_by_sensitivity(model, [batch], candidates, budget)
        used = sum(sizes[name] * bits[format] for name, format in chosen.items())
        assert used <= budget * sum(sizes[name] for name in chosen)
        cost = sum(costs[name][format] for name, format in chosen.items())
        assert cost < last
        last = cost
    assert set(formats_by_sensitivity(model, [batch], candidates, 4.5).values()) == {"int4_g32"}
    assert cost == 0


def test_budgets_that_make_no_sense(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"at least 4\.5 bits, what int4_g32 needs, found 4"):
        formats_by_sensitivity(model, [tiny_batch()], ["int8_g32", "int4_g32"], 4)
    with pytest.raises(ValueError, match="weight-only formats for a budget of bits, found fp8_e4m3"):
        formats_by_sensitivity(model, [tiny_batch()], ["fp8_e4m3"], 8)
