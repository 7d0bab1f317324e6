"""Every score against its definition, unit by unit and sample by sample without padding, and nothing left behind."""

from collections import defaultdict
from collections.abc import Callable
from itertools import chain

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import FAMILIES, decoder_layers
from models.pruning.scores.first_order import SCORES, random_scores, top_indices
from models.pruning.scores.importance import ImportanceScores
from tests.helpers.masking import cut_model
from tests.helpers.tiny import tiny_batch

LONGER = [("one two three four", "five six"), ("?", "!")]
WITH_DATA = ["wanda", "activation", "taylor"]
Read = dict[tuple[int, str], Tensor]


def read_by(model: PreTrainedModel, batches: list[Batch]) -> list[Read]:
    """Of every sample alone, without padding, what each layer's projections read, (T, inputs)."""
    samples = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            read: Read = {}
            hooks = []
            for layer in decoder_layers(model):
                places = {"down": layer.down_proj, "out": layer.o_proj, "qkv": layer.keys.linear, "up": layer.up.linear}
                for place, module in places.items():

                    def record(_, inputs, key=(layer.index, place)):
                        read[key] = inputs[0].detach()[0].double()

                    hooks.append(module.register_forward_pre_hook(record))
            with torch.no_grad():
                model(ids[mask.bool()][None])
            for hook in hooks:
                hook.remove()
            samples.append(read)
    return samples


def units_of(model: PreTrainedModel) -> dict[str, list[list[list[tuple[int, str, int]]]]]:
    """Axis -> its lists of units (one per layer, hidden: one) -> the unit's places (layer, place, column)."""
    layers = decoder_layers(model)
    axes: dict[str, list[list[list[tuple[int, str, int]]]]] = defaultdict(list)
    for layer in layers:
        i, columns = layer.index, layer.o_proj.weight.shape[1]
        axes["neurons"].append([[(i, "down", u)] for u in range(layer.num_neurons)])
        for axis, units in (("query_heads", layer.num_query_heads), ("kv_groups", layer.num_kv_groups)):
            width = columns // units
            axes[axis].append([[(i, "out", u * width + c) for c in range(width)] for u in range(units)])
    channels = range(model.config.hidden_size)
    axes["hidden"] = [[[(x.index, p, c) for x in layers for p in ("qkv", "up")] for c in channels]]
    return axes


def by_definition(
    model: PreTrainedModel, score: Callable[[list[tuple[int, str, int]]], float]
) -> dict[str, list[list[float]]]:
    """The score of every unit; a channel's is the sum over the places that read it."""

    def of_unit(axis: str, places: list[tuple[int, str, int]]) -> float:
        return sum(score([place]) for place in places) if axis == "hidden" else score(places)

    return {
        axis: [[of_unit(axis, places) for places in units] for units in lists]
        for axis, lists in units_of(model).items()
    }


def as_lists(scores: ImportanceScores) -> dict[str, list[Tensor]]:
    return vars(scores) | {"hidden": [scores.hidden]}


def check(scores: ImportanceScores, expected: dict[str, list[list[float]]]) -> None:
    found = as_lists(scores)
    for axis, lists in expected.items():
        for index, (one, other) in enumerate(zip(found[axis], lists, strict=True)):
            assert one.dtype == torch.float32
            torch.testing.assert_close(
                one, torch.tensor(other), rtol=1e-4, atol=1e-6, msg=lambda m, a=axis, i=index: f"{a} {i}: {m}"
            )


def flat(scores: ImportanceScores) -> Tensor:
    return torch.cat(list(chain(*as_lists(scores).values())))


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_by_its_definition(family: str, batch: Batch) -> None:
    model, batches = cut_model(family), [batch, tiny_batch(LONGER)]
    assert all((b["attention_mask"] == 0).any() for b in batches), "padding must be there to be left out"
    samples = read_by(model, batches)

    def score(places: list[tuple[int, str, int]]) -> float:
        columns = [torch.stack([read[i, place][:, c] for i, place, c in places]) for read in samples]
        return sum(float(x.norm(dim=0).mean()) ** 2 for x in columns) ** 0.5

    check(SCORES["activation"](model, batches), by_definition(model, score))


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_by_its_definition(family: str, batch: Batch) -> None:
    model, batches = cut_model(family), [batch, tiny_batch(LONGER)]
    tokens = {key: torch.cat([read[key] for read in read_by(model, batches)]) for key in read_by(model, batches)[0]}
    weights = {}
    for layer in decoder_layers(model):
        weights[layer.index, "down"] = layer.down_proj.weight
        weights[layer.index, "out"] = layer.o_proj.weight
        weights[layer.index, "qkv"] = torch.cat([layer.queries.weight, layer.keys.weight, layer.values.weight])
        weights[layer.index, "up"] = torch.cat([layer.gate.weight, layer.up.weight])

    def score(places: list[tuple[int, str, int]]) -> float:
        products = [weights[i, p][:, c].detach().double().norm() * tokens[i, p][:, c].norm() for i, p, c in places]
        return sum(float(product) ** 2 for product in products) ** 0.5

    check(SCORES["wanda"](model, batches), by_definition(model, score))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_norm_of_what_a_cut_removes(family: str, tied: bool) -> None:
    """Mark a unit's entries by hand in copies of all matrices, and take the norm of what is marked."""
    model = cut_model(family, tie_word_embeddings=tied)
    layers, width = decoder_layers(model), decoder_layers(model)[0].head_dim
    repeats = layers[0].num_query_heads // layers[0].num_kv_groups

    def norm(*entries: Tensor) -> float:
        return float(torch.cat([e.detach().double().flatten() for e in entries]).norm())

    def span(index: int, size: int) -> slice:
        return slice(index * size, (index + 1) * size)

    expected: dict[str, list[list[float]]] = defaultdict(list)
    for x in layers:
        o, down = x.o_proj.weight, x.down_proj.weight
        expected["neurons"].append([norm(x.gate.weight[u], x.up.weight[u], down[:, u]) for u in range(x.num_neurons)])
        expected["query_heads"].append(
            [norm(x.queries.weight[span(h, width)], o[:, span(h, width)]) for h in range(x.num_query_heads)]
        )
        expected["kv_groups"].append(
            [
                norm(
                    x.queries.weight[span(g, repeats * width)],
                    o[:, span(g, repeats * width)],
                    x.keys.weight[span(g, width)],
                    x.values.weight[span(g, width)],
                )
                for g in range(x.num_kv_groups)
            ]
        )
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2]  # a tied one is there once
    rows = [layer.o_proj.weight for layer in layers] + [layer.down_proj.weight for layer in layers]
    is_row = [any(matrix is row for row in rows) for matrix in matrices]
    expected["hidden"] = [
        [norm(*(m[c] if r else m[:, c] for m, r in zip(matrices, is_row, strict=True))) for c in range(32)]
    ]
    check(SCORES["magnitude"](model, []), expected)


def test_random_depends_on_the_seed_alone(model: PreTrainedModel, batch: Batch) -> None:
    first, again, other = random_scores(model, []), random_scores(model, [batch]), random_scores(model, [], seed=1)
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first), flat(other))
    assert len(flat(first).unique()) == 140, "units of all layers and axes get numbers of their own"
    assert [len(s) for s in chain(*as_lists(first).values())] == [48, 48, 4, 4, 2, 2, 32]


@pytest.mark.parametrize("name", SCORES)
def test_processes_together_score_all_their_batches(name: str, model: PreTrainedModel, batch: Batch) -> None:
    """Two halves of the batches, summed as processes would sum them, against all batches in one process."""
    sent: list[Tensor] = []

    def send(sums: Tensor) -> Tensor:
        sent.append(sums.clone())
        return sums

    SCORES[name](model, [tiny_batch(LONGER)], total=send)
    assert len(sent) == (name in WITH_DATA)
    together = SCORES[name](model, [batch, tiny_batch(LONGER)])
    halves = SCORES[name](model, [batch], total=lambda sums: sums + sent[0])
    torch.testing.assert_close(flat(halves), flat(together))


@pytest.mark.parametrize("name", WITH_DATA)
def test_padding_tokens_do_not_matter(name: str, model: PreTrainedModel, batch: Batch) -> None:
    other = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 17)
    assert not torch.equal(other, batch["input_ids"])
    a, b = SCORES[name](model, [batch]), SCORES[name](model, [{**batch, "input_ids": other}])
    assert torch.equal(flat(a), flat(b))


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_dead_units_score_zero_and_no_others(name: str, family: str, batch: Batch) -> None:
    model = cut_model(family)
    with torch.no_grad():
        decoder_layers(model)[1].up.weight[5] = 0
        decoder_layers(model)[0].values.weight[8:16] = 0  # the second group, with heads 2 and 3
    scores = SCORES[name](model, [batch])
    for units, dead in ((scores.neurons[1], [5]), (scores.kv_groups[0], [1]), (scores.query_heads[0], [2, 3])):
        assert units.argwhere().flatten().tolist() == [u for u in range(len(units)) if u not in dead]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_nothing_is_left_behind(name: str, model: PreTrainedModel, batch: Batch, training: bool) -> None:
    model.train(training)
    model.model.layers[0].train(not training)
    model.model.layers[1].mlp.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = SCORES[name](model, [batch])
    assert not flat(scores).requires_grad
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.embed_tokens.weight"]
    assert (model.lm_head.weight.grad == 1).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", WITH_DATA)
def test_hooks_go_and_the_mode_returns_when_a_batch_fails(name: str, model: PreTrainedModel, batch: Batch) -> None:
    model.train()
    with pytest.raises(IndexError):
        SCORES[name](model, [batch, {**batch, "input_ids": torch.full_like(batch["input_ids"], 10**6)}])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", WITH_DATA)
def test_no_batch_is_an_error(name: str, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="expected at least one calibration batch, found none"):
        SCORES[name](model, [])


@pytest.mark.parametrize("name", WITH_DATA)
def test_dropout_is_off_while_scoring(name: str, model: PreTrainedModel, batch: Batch) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert torch.equal(flat(SCORES[name](model, [batch])), flat(SCORES[name](model, [batch])))


@pytest.mark.parametrize("name", SCORES)
def test_half_precision_models_get_float32_scores(name: str, model: PreTrainedModel, batch: Batch) -> None:
    exact = flat(SCORES[name](model, [batch]))
    rough = flat(SCORES[name](model.bfloat16(), [batch]))
    assert rough.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.99


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([1.0, 3.0, 2.0, 0.0], 2, [1, 2]),
        ([5.0, 1.0, 4.0], 3, [0, 1, 2]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, 2.0, 1.0, 2.0, 1.0, 1.0], 3, [1, 2, 3]),
    ],
)
def test_top_indices_ascend_and_ties_go_to_the_lower(scores: list[float], count: int, expected: list[int]) -> None:
    assert top_indices(torch.tensor(scores), count) == expected


def test_ties_are_stable_in_long_tensors() -> None:
    scores = torch.arange(1000) % 2
    assert top_indices(scores.float(), 100) == list(range(1, 200, 2))
