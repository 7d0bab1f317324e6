"""Chooses the decoder layers to drop: by how much each one turns the residual stream, or by a metric measured without a block of them.

Legend: B samples, T tokens, D hidden, L layers.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import decoder_layers
from models.calibration.observe import Observer, evaluating, observe, on_device
from models.forward import answer_labels, lazy_logits
from models.losses.output_head import pieces_of
from models.pruning.scores.importance import Total, identity
from models.structure.slicing import checked_indices


def block_influence(model: PreTrainedModel, batches: Iterable[Batch], *, total: Total = identity) -> Tensor:
    """Block influence of each layer (ShortGPT, arXiv 2403.03853): 1 - mean over tokens of the cosine of its input and output.

    Scores (L,) are float32, from 0 (the layer only scales its input) to 2.  The model is left as it was.

    Raises:
        ValueError: There was no batch, or the model's family is unknown.
    """
    layers = decoder_layers(model)
    sums = torch.zeros(2, len(layers), dtype=torch.float64, device=model.device)  # of 1 - cosine, and of tokens

    def observer(index: int) -> Observer:
        def add(x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor) -> None:
            cosine_BT = F.cosine_similarity(x_BTD.float(), y_BTD.float(), dim=-1)
            sums[0, index] += ((1 - cosine_BT) * mask_BT).sum()
            sums[1, index] += mask_BT.sum()

        return add

    observe(model, batches, [(layer.block, observer(layer.index)) for layer in layers])
    turned_L, tokens_L = total(sums)
    return (turned_L / tokens_L).float()


def layers_to_drop(scores_L: Tensor, count: int) -> list[int]:
    """The `count` layers of lowest score, ascending; the first of equal ones.

    Raises:
        ValueError: There are not that many, or none would be left.
    """
    _check_count(count, len(scores_L))
    return sorted(torch.argsort(scores_L, stable=True)[:count].tolist())


def search_block(num_layers: int, count: int, metric: Callable[[list[int]], float]) -> list[int]:
    """The block of consecutive layers whose removal leaves the best model (Minitron, arXiv 2408.11796, section 2.2).

    The metric judges the model without the layers it is given, ascending; lower is better (KL, perplexity), and
    `without_layers` helps.  Returned are the layers of the best block, ascending; the first of equal ones.

    Raises:
        ValueError: There are not that many layers, none would be left, or the metric of a block is not a number.
    """
    _check_count(count, num_layers)
    blocks = [list(range(start, start + count)) for start in range(num_layers - count + 1)]
    values = [metric(block) for block in blocks]
    for block, value in zip(blocks, values, strict=True):
        if math.isnan(value):
            raise ValueError(
                f"expected the metric without layers {block[0]} to {block[-1]} to be a number, found {value}; measure it in "
                "float32, on batches with answer tokens"
            )
    return blocks[values.index(min(values))]


@torch.no_grad()
def removal_loss(
    model: PreTrainedModel, batches: Iterable[Batch], layers: Sequence[int], *, total: Total = identity
) -> float:
    """Cross-entropy of the answers without these layers, nats per answer token: a metric for `search_block`.

    Raises:
        ValueError: There was no batch, or there is no such layer.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)  # of -log p, and of tokens
    with evaluating(model), without_layers(model, layers):
        for batch in on_device(batches, model.device):
            labels_N, logits = answer_labels(batch), lazy_logits(model, batch)
            for rows in pieces_of(len(labels_N), logits.vocabulary):
                sums[0] += F.cross_entropy(logits[rows].float(), labels_N[rows], reduction="sum")
            sums[1] += len(labels_N)
    loss, tokens = total(sums)
    return float(loss / tokens)


@contextmanager
def without_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Let a model skip these decoder layers for a while, at no cost: it computes what it would after `drop_layers`.

    Weights and modules stay; only calls pass the layers by.  For forward passes without a cache.

    Raises:
        ValueError: There is no such layer.
    """
    blocks = [layer.block for layer in decoder_layers(model)]
    skipped = [blocks[index] for index in checked_indices(layers, len(blocks), "without_layers to skip decoder layers")]
    own = [vars(block).get("forward") for block in skipped]  # a wrapper's, where there is one, instead of the class's
    try:
        for block in skipped:
            block.forward = _pass_by
        yield
    finally:
        for block, forward in zip(skipped, own, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward


def _pass_by(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _check_count(count: int, num_layers: int) -> None:
    if not 1 <= count < num_layers:
        raise ValueError(
            f"expected to drop 1 to {num_layers - 1} of {num_layers} layers, found {count}; change the number of layers kept"
        )
