"""Importance of a model's units, one small function for each score, all over the same calibration batches.

A score that needs activations sees a unit where linear layers read it:

- neuron: the input of `down_proj`; query head and key/value group: the input of `o_proj`, head_dim channels for a head;
- hidden channel: the inputs of attention and MLP, after the norms; its score is the sum over these inputs of all layers.

Padding does not count and statistics are float32 or better.  The second-order score is elsewhere: it comes with new weights.

Legend: B samples, T tokens, I inputs of a linear layer, O outputs, U units.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import Part, decoder_layers
from models.calibration.observe import Observer, observe
from models.pruning.scores.importance import ImportanceScores, Score, Total, identity, unit_counts
from models.pruning.scores.taylor import taylor_scores

Statistic = Callable[[Tensor, Tensor], Tensor]  # what a site reads (B, T, I) and the mask (B, T) -> (U,)


def random_scores(
    model: PreTrainedModel, batches: Iterable[Batch] = (), *, total: Total = identity, seed: int = 0
) -> ImportanceScores:
    """The control: uniform random numbers, which depend on the seed alone."""
    counts = unit_counts(model)
    drawn = torch.rand(sum(counts), generator=torch.Generator().manual_seed(seed)).to(model.device)
    return ImportanceScores.in_order(drawn.split(counts), len(decoder_layers(model)))


@torch.no_grad()
def magnitude_scores(
    model: PreTrainedModel, batches: Iterable[Batch] = (), *, total: Total = identity, seed: int = 0
) -> ImportanceScores:
    """L2 norm of the weights that go with a unit, without data: the rows that make it and the columns that read it.

    A group has the rows and columns of its query heads, its keys and its values.  A hidden channel has its row or column of every
    projection, of the embedding and of the head, tied ones once.  Biases and norms do not count.
    """
    layers = decoder_layers(model)
    neurons, heads, groups = [], [], []
    hidden = _squares(0, *{model.get_input_embeddings().weight, model.get_output_embeddings().weight})
    for layer in layers:
        gate, up, down = layer.gate.weight, layer.up.weight, layer.down_proj.weight
        query, key, value, out = layer.queries.weight, layer.keys.weight, layer.values.weight, layer.o_proj.weight
        of_query = _squares(1, query) + _squares(0, out)
        neurons.append(_squares(1, gate, up) + _squares(0, down))
        heads.append(_per_unit(of_query, layer.num_query_heads))
        of_key_value = _squares(1, key, value)
        groups.append(_per_unit(of_query, layer.num_kv_groups) + _per_unit(of_key_value, layer.num_kv_groups))
        hidden = hidden + _squares(0, query, key, value, gate, up) + _squares(1, out, down)
    return ImportanceScores.in_order([squares.sqrt() for squares in (*neurons, *heads, *groups, hidden)], len(layers))


def wanda_scores(
    model: PreTrainedModel, batches: Iterable[Batch], *, total: Total = identity, seed: int = 0
) -> ImportanceScores:
    """Wanda (arXiv 2306.11695) for whole units: L2 norm of |weight| * ||input|| over all weights that read the unit.

    For a neuron u that is ||W[:, u]|| * ||x_u||, with W of `down_proj` and x_u over all tokens.
    """

    def statistic(site: _Site) -> Statistic:
        weights_I = _squares(0, *(part.weight for part in site.readers))
        return lambda x_BTI, mask_BT: _per_unit(x_BTI[mask_BT.bool()].square().sum(0) * weights_I, site.units)

    return _root_of_sums(model, batches, total, statistic)


def activation_scores(
    model: PreTrainedModel, batches: Iterable[Batch], *, total: Total = identity, seed: int = 0
) -> ImportanceScores:
    """Size of the activations (Minitron, arXiv 2407.14679): units that are always small change the output least.

    The statistic of one sample is the mean over its tokens of |x|, and of the L2 norm of x for heads and groups; samples are
    combined by an L2 norm ("sequence mean, batch L2").
    """

    def statistic(site: _Site) -> Statistic:
        def mean_squares(x_BTI: Tensor, mask_BT: Tensor) -> Tensor:
            norms_BTU = x_BTI.unflatten(-1, (site.units, -1)).norm(dim=-1)
            mask_BT1 = mask_BT.float().unsqueeze(-1)
            return ((norms_BTU * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)).square().sum(0)

        return mean_squares

    return _root_of_sums(model, batches, total, statistic)


SCORES: dict[str, Score] = {
    "random": random_scores,
    "magnitude": magnitude_scores,
    "wanda": wanda_scores,
    "activation": activation_scores,
    "taylor": taylor_scores,
}


def top_indices(scores: Tensor, count: int) -> list[int]:
    """The indices of the `count` largest scores, ascending; ties go to the lower index."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


@dataclass(frozen=True)
class _Site:
    """A place where linear layers read units, which lie there one after the other and have equal widths."""

    readers: Sequence[Part]
    units: int


def _sites(model: PreTrainedModel) -> list[_Site]:
    """In the order of `ImportanceScores.in_order`; the channels are read by each layer's attention and by its MLP."""
    layers, hidden = decoder_layers(model), model.config.hidden_size
    down = [[Part(layer.down_proj, 0, hidden)] for layer in layers]
    out = [[Part(layer.o_proj, 0, hidden)] for layer in layers]
    return [
        *(_Site(readers, layer.num_neurons) for readers, layer in zip(down, layers, strict=True)),
        *(_Site(readers, layer.num_query_heads) for readers, layer in zip(out, layers, strict=True)),
        *(_Site(readers, layer.num_kv_groups) for readers, layer in zip(out, layers, strict=True)),
        *(_Site((layer.queries, layer.keys, layer.values), hidden) for layer in layers),
        *(_Site((layer.gate, layer.up), hidden) for layer in layers),
    ]


@torch.no_grad()
def _root_of_sums(
    model: PreTrainedModel, batches: Iterable[Batch], total: Total, statistic: Callable[[_Site], Statistic]
) -> ImportanceScores:
    """The root of each site's statistic, summed over all batches of all processes."""
    sites = _sites(model)
    sums = [torch.zeros(site.units, dtype=torch.float64, device=model.device) for site in sites]

    def observer(site: _Site, sum_U: Tensor) -> Observer:
        of_batch = statistic(site)

        def add(x_BTI: Tensor, _: Tensor, mask_BT: Tensor) -> None:
            sum_U.add_(of_batch(x_BTI.float(), mask_BT))

        return add

    observers = [(site.readers[0].linear, observer(site, sum_U)) for site, sum_U in zip(sites, sums, strict=True)]
    observe(model, batches, observers)
    scores = total(torch.cat(sums)).sqrt().float().split([site.units for site in sites])
    return ImportanceScores.in_order(scores, len(decoder_layers(model)))


def _squares(dim: int, *weights_OI: Tensor) -> Tensor:
    """Sums of squares over the outputs (dim 0) or inputs (dim 1) of matrices, added up: (I,) or (O,), float32."""
    norms = [torch.linalg.vector_norm(weight_OI, dim=dim, dtype=torch.float32) for weight_OI in weights_OI]
    return torch.stack(norms).square().sum(0)


def _per_unit(values_I: Tensor, units: int) -> Tensor:
    return values_I.unflatten(0, (units, -1)).sum(-1)
