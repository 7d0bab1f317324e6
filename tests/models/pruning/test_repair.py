"""Repair after a cut: exact where it can be, an explicit least-squares fit elsewhere, and nearer to the dense model for every cut."""

import copy
import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import FAMILIES, decoder_layers
from models.pruning.repair import Prefix, repair
from models.structure.edits import Edit, replay
from tests.helpers.masking import close, cut_model, logits
from tests.helpers.tiny import tiny_batch

BATCHES = [tiny_batch(), tiny_batch([("one two three four", "five six"), ("?", "!")])]
PREFIXES: tuple[Prefix, ...] = ("layerwise", "sequential")
CUTS: dict[str, list[Edit]] = {
    "neurons": [{"op": "narrow_mlp", "layer": index, "keep": list(range(0, 48, 2))} for index in range(3)],
    "groups": [{"op": "narrow_kv_groups", "layer": index, "keep": [0, 1, 3]} for index in range(3)],
    "heads": [{"op": "narrow_query_heads", "layer": index, "keep": [0, 3, 4, 7]} for index in range(3)],
    "channels": [{"op": "narrow_hidden", "keep": [channel for channel in range(32) if channel % 8]}],
    "first layer": [{"op": "drop_layers", "layers": [0]}],
    "middle layer": [{"op": "drop_layers", "layers": [1]}],
}
CUTS["all"] = [*CUTS["neurons"], *CUTS["groups"], *CUTS["middle layer"], *CUTS["channels"]]
# Dropped layers that no layerwise fit sees, as layers read the dense stream and (Gemma) aim at their own dense outputs.
UNSEEN = {False: ("first layer",), True: ("first layer", "middle layer")}
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}}


def cut(dense: PreTrainedModel, edits: Sequence[Edit]) -> PreTrainedModel:
    model = copy.deepcopy(dense)
    replay(model, edits)
    return model


def distance(model: PreTrainedModel, dense: PreTrainedModel, edits: Sequence[Edit]) -> float:
    """Mean square difference of the final hidden states, over the channels that are left."""
    channels = next((edit["keep"] for edit in edits if edit["op"] == "narrow_hidden"), slice(None))
    squares = []
    for batch in BATCHES:
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            found, aim = (m.base_model(**given).last_hidden_state for m in (model, dense))
        squares.append((found - aim[..., channels])[batch["attention_mask"].bool()].square().flatten())
    return float(torch.cat(squares).mean())


@torch.no_grad()
def make_redundant(model: PreTrainedModel) -> list[Edit]:
    """Neurons, heads and groups that are multiples of others; returns a cut that takes them away."""
    edits: list[Edit] = []
    for layer in decoder_layers(model):
        for factor, part in ((1.0, layer.gate), (-0.5, layer.up)):
            part.weight[40:] = factor * part.weight[:8]
        for part in (layer.queries, layer.keys, layer.values):
            width = part.size // 4
            part.weight[3 * width :] = part.weight[:width] * (3 if part is layer.values else 1)
        layer.queries.weight[:8] = layer.queries.weight[8:16]  # heads 0 and 1 are one,
        layer.queries.weight[48:56] = layer.queries.weight[56:64] = layer.queries.weight[8:16]  # as are 6 and 7
        edits.append({"op": "narrow_mlp", "layer": layer.index, "keep": list(range(40))})
        edits.append({"op": "narrow_kv_groups", "layer": layer.index, "keep": [0, 1, 2]})
    return edits


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3", "gemma2", "gemma3_text"])
def test_units_that_others_explain_are_made_good(family: str, prefix: Prefix) -> None:
    dense = cut_model(family)
    edits = make_redundant(dense)
    model = cut(dense, edits)
    assert not torch.allclose(logits(model), logits(dense), atol=0.1)
    repair(model, dense, edits, BATCHES, prefix=prefix, ridge=1e-7)
    close(logits(model), logits(dense))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("gone", [[0], [1], [2], [0, 1]])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_that_did_nothing_are_not_missed(family: str, gone: list[int], prefix: Prefix) -> None:
    dense = cut_model(family)
    with torch.no_grad():
        for index in gone:
            decoder_layers(dense)[index].o_proj.weight.zero_()
            decoder_layers(dense)[index].down_proj.weight.zero_()
    edits: list[Edit] = [{"op": "drop_layers", "layers": gone}]
    model = cut(dense, edits)
    repair(model, dense, edits, BATCHES, prefix=prefix, ridge=0.1)
    close(logits(model), logits(dense))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_silent_channels_are_not_missed(family: str, prefix: Prefix) -> None:
    """Gemma's stream is a multiple of the dense one when channels have gone."""
    dense, edits = cut_model(family), CUTS["channels"]
    silent = [channel for channel in range(32) if channel not in edits[0]["keep"]]
    with torch.no_grad():
        dense.get_input_embeddings().weight[:, silent] = 0
        for layer in decoder_layers(dense):
            layer.o_proj.weight[silent] = layer.down_proj.weight[silent] = 0
    model = cut(dense, edits)
    close(logits(model), logits(dense))
    repair(model, dense, edits, BATCHES, prefix=prefix, ridge=0.01)
    close(logits(model), logits(dense))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_repaired_model_is_nearer_to_the_dense_one(family: str, name: str, prefix: Prefix) -> None:
    dense, edits = cut_model(family, **BIASES.get(family, {})), CUTS[name]
    model = cut(dense, edits)
    before = distance(model, dense, edits)
    repair(model, dense, edits, BATCHES, prefix=prefix, ridge=0.3)
    after = distance(model, dense, edits)
    assert before > 1e-3
    if prefix == "layerwise" and name in UNSEEN[family.startswith("gemma")]:
        assert after == pytest.approx(before, rel=1e-4)
    else:
        assert after < before


# Weights ------------------------------------------------------------------------------------------------------------


def streams(model: PreTrainedModel) -> dict[str, Tensor]:
    """In the first layer, at valid tokens of all batches: inputs and outputs of both projections, and the stream around them."""
    layer = decoder_layers(model)[0]
    seen: dict[str, list[Tensor]] = {}
    valid: list[Tensor] = []

    def note(**passing: Tensor) -> None:
        for name, value in passing.items():
            seen.setdefault(name, []).append(value[valid[0]].double())

    hooks = [
        layer.block.register_forward_pre_hook(lambda m, args: note(start=args[0])),
        layer.stream_norms[1].register_forward_pre_hook(lambda m, args: note(middle=args[0])),
        layer.block.register_forward_hook(lambda m, args, out: note(end=out)),
        layer.o_proj.register_forward_hook(lambda m, args, out: note(o_input=args[0], o_output=out)),
        layer.down_proj.register_forward_hook(lambda m, args, out: note(down_input=args[0], down_output=out)),
    ]
    for batch in BATCHES:
        valid[:] = [batch["attention_mask"].bool()]
        with torch.no_grad():
            model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(values) for name, values in seen.items()}


def explicit(x: Tensor, aim: Tensor, stream: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """Rows of [X; sqrt(ridge) I], each token over the root mean square of the dense stream behind it."""
    root = stream.square().mean(1, keepdim=True).rsqrt()
    strength = (ridge * (x * root).square().sum(0).mean()).sqrt()
    pull = strength * torch.eye(x.shape[1], dtype=torch.float64)
    rows, aims = torch.cat([x * root, pull]), torch.cat([aim * root, strength * weight.detach().double().T])
    return torch.linalg.lstsq(rows, aims).solution.T


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_weights_are_an_explicit_fit(family: str, prefix: Prefix) -> None:
    """Gemma has a norm behind each projection, so its aims are the dense projections' outputs."""
    dense, edits = cut_model(family, **BIASES.get(family, {})), [*CUTS["neurons"], *CUTS["heads"]]
    model = cut(dense, edits)
    old = copy.deepcopy(decoder_layers(model)[0])
    repair(model, dense, edits, BATCHES, prefix=prefix, ridge=0.3)
    layer, aims, found = decoder_layers(model)[0], streams(dense), streams(model)
    for name, new, before, start, end in (
        ("o", layer.o_proj, old.o_proj, "start", "middle"),
        ("down", layer.down_proj, old.down_proj, "middle", "end"),
    ):
        aim = aims[f"{name}_output"] if family == "gemma2" else aims[end] - found[start]
        if new.bias is not None:
            aim = aim - new.bias.detach().double()
        expected = explicit(found[f"{name}_input"], aim, aims[end], before.weight, 0.3)
        torch.testing.assert_close(new.weight.detach().double(), expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(new.weight, before.weight, atol=1e-2)


def test_a_dropped_layer_is_part_of_the_aim_of_the_one_before() -> None:
    dense = cut_model("llama", num_hidden_layers=2)
    edits: list[Edit] = [{"op": "drop_layers", "layers": [1]}]
    model = cut(dense, edits)
    old = copy.deepcopy(model)
    ends: list[Tensor] = []
    hook = dense.model.norm.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    logits(dense, BATCHES[0])
    hook.remove()
    repair(model, dense, edits, BATCHES[:1], prefix="sequential", ridge=0.1)
    end = ends[0][BATCHES[0]["attention_mask"].bool()].double()
    count = len(end)
    found = {name: value[:count] for name, value in streams(model).items()}
    weight = decoder_layers(old)[0].down_proj.weight
    expected = explicit(found["down_input"], end - found["middle"], end, weight, 0.1)
    down = decoder_layers(model)[0].down_proj.weight
    torch.testing.assert_close(down.detach().double(), expected, rtol=1e-3, atol=1e-4)


# Around it ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_two_processes_equal_one(prefix: Prefix) -> None:
    """Two threads, each with its copy and its batch, meet at every sum."""
    dense, edits = cut_model("llama"), CUTS["all"]
    whole = cut(dense, edits)
    repair(whole, dense, edits, BATCHES, prefix=prefix, ridge=0.3)
    meeting, slots = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2
    halves = [cut(dense, edits) for _ in range(2)]

    def process(rank: int, own_dense: PreTrainedModel, batch: Batch) -> None:
        def total(x: Tensor) -> Tensor:
            slots[rank] = x
            meeting.wait()
            summed = slots[0] + slots[1]
            meeting.wait()
            return summed

        repair(halves[rank], own_dense, edits, [batch], prefix=prefix, ridge=0.3, total=total)

    threads = [threading.Thread(target=process, args=(r, copy.deepcopy(dense), BATCHES[r])) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (name, one), (_, two) in zip(halves[0].named_parameters(), halves[1].named_parameters(), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, whole.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_only_the_two_projections_change() -> None:
    dense, edits = cut_model("llama", **BIASES["llama"]), CUTS["all"]
    dense.train()
    before = {name: p.detach().clone() for name, p in dense.named_parameters()}
    model = cut(dense, edits)
    objects = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    repair(model, dense, edits, BATCHES, prefix="sequential", ridge=0.3)
    assert all(torch.equal(p, before[name]) for name, p in dense.named_parameters())
    for name, parameter in model.named_parameters():
        number, learns, old = objects[name]
        assert (id(parameter), parameter.requires_grad) == (number, learns)
        assert torch.equal(parameter, old) != name.endswith(("o_proj.weight", "down_proj.weight"))
    for one in (model, dense):
        assert all(module.training for module in one.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())


def test_what_is_refused() -> None:
    dense, edits = cut_model("llama"), CUTS["neurons"]
    model = cut(dense, edits)
    with pytest.raises(ValueError, match="expected at least one calibration batch, found none"):
        repair(model, dense, edits, [], prefix="layerwise", ridge=0.3)
    with pytest.raises(ValueError, match="expected calibration statistics .*; raise the ridge"):
        repair(model, dense, edits, [tiny_batch([("a", "b")])], prefix="layerwise", ridge=0)
