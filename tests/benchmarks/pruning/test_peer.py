"""The peer of the pruning study: it keeps what Torch-Pruning's documented scores say, and only where Torch-Pruning can cut."""

import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks.pruning.peer import torch_pruning_edits
from models.architecture import decoder_layers
from models.pruning.cut import Targets
from models.structure.edits import Edit, replay
from tests.helpers.masking import cut_model
from tests.helpers.tiny import PAIRS, tiny_batch

BATCHES = [tiny_batch(PAIRS[:3]), tiny_batch(PAIRS[3:])]


@pytest.fixture
def peer() -> Any:
    return pytest.importorskip("torch_pruning")


@pytest.fixture
def model() -> PreTrainedModel:
    return cut_model("llama").requires_grad_(False)


def kept(layer: Any, of_weight: Any, neurons: int) -> list[int]:
    """The neurons with the largest sums, over gate rows, up rows and down columns, of a function of the weight."""
    gate, up, down = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.down_proj.weight
    scores = of_weight(gate).sum(1) + of_weight(up).sum(1) + of_weight(down).sum(0)
    return sorted(scores.topk(neurons).indices.tolist())


@pytest.mark.parametrize("neurons", [1, 11, 20, 47, 48])
def test_magnitude_keeps_the_largest_group_norms(peer: Any, model: PreTrainedModel, neurons: int) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edits = torch_pruning_edits(model, [], Targets(neurons=neurons), "magnitude")
    layers = decoder_layers(model)
    expected = [kept(layer, torch.square, neurons) for layer in layers]
    assert edits == [{"op": "narrow_mlp", "layer": index, "keep": keep} for index, keep in enumerate(expected)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    replay(model, edits)
    assert [layer.num_neurons for layer in decoder_layers(model)] == [neurons] * 3


def test_taylor_keeps_the_largest_products_with_the_gradients_of_all_batches(peer: Any, model: PreTrainedModel) -> None:
    edits = torch_pruning_edits(model, BATCHES, Targets(neurons=20), "taylor")
    model.requires_grad_(True)
    for batch in BATCHES:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").backward()
    expected = [kept(layer, lambda w: (w * w.grad).abs(), 20) for layer in decoder_layers(model)]
    assert [edit["keep"] for edit in edits] == expected
    assert expected != [kept(layer, torch.square, 20) for layer in decoder_layers(model)]


def test_scores_are_the_same_within_autocast_and_without_gradients(peer: Any, model: PreTrainedModel) -> None:
    def edits() -> list[Edit]:
        return torch_pruning_edits(model, [], Targets(neurons=20), "magnitude")

    expected = edits()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert edits() == expected


def test_taylor_needs_batches(peer: Any, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="expected at least one calibration batch, found none"):
        torch_pruning_edits(model, [], Targets(neurons=20), "taylor")


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (Targets(), "found none"),
        (Targets(kv_groups=2), "found {'kv_groups': 2}"),
        (Targets(neurons=20, layers=2), "found {'neurons': 20, 'layers': 2}"),
    ],
)
def test_other_axes_are_refused(peer: Any, model: PreTrainedModel, targets: Targets, found: str) -> None:
    with pytest.raises(
        ValueError, match=f"expected a target of neurons and no other, {found}; .*keeps all key/value heads"
    ):
        torch_pruning_edits(model, [], targets, "magnitude")


def test_another_number_than_the_target_is_not_hidden(peer: Any, model: PreTrainedModel) -> None:
    with pytest.raises(
        ValueError, match="expected Torch-Pruning to keep 49 neurons of layer 0, found that it keeps 48 of 48"
    ):
        torch_pruning_edits(model, [], Targets(neurons=49), "magnitude")
    replay(model, [{"op": "narrow_mlp", "layer": 2, "keep": list(range(40))}])
    with pytest.raises(
        ValueError, match="expected Torch-Pruning to keep 24 neurons of layer 2, found that it keeps 20 of"
    ):
        torch_pruning_edits(model, [], Targets(neurons=24), "magnitude")


@pytest.mark.parametrize(("ratio", "query_heads_left"), [(0.5, 4), (0.9, 8)])
def test_torch_pruning_never_cuts_shared_key_value_heads(peer: Any, ratio: float, query_heads_left: int) -> None:
    model = cut_model("llama", num_key_value_heads=2)
    layers = decoder_layers(model)
    heads = {layer.attention.q_proj: 8 for layer in layers}
    heads |= {projection: 2 for layer in layers for projection in (layer.attention.k_proj, layer.attention.v_proj)}
    pruner = peer.pruner.BasePruner(
        model,
        {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False},
        peer.importance.GroupMagnitudeImportance(),
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        ignored_layers=[
            module for module in model.modules() if type(module) is torch.nn.Linear and module not in heads
        ],
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    assert [layer.num_query_heads for layer in layers] == [query_heads_left] * 3
    assert [layer.attention.k_proj.out_features for layer in layers] == [2 * 8] * 3


def test_a_missing_package_is_named(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"expected the package `torch-pruning`.*`pip install -e .\[bench\]`"):
        torch_pruning_edits(model, [], Targets(neurons=20), "magnitude")
