"""First-order Taylor importance (after Molchanov et al., arXiv 1906.10771): what the loss would change by if a unit went.

Put a factor g = 1 on the activations x of a unit.  Then dL/dg = sum over tokens of x * dL/dx is, up to its sign and to first order,
the change of a sample's loss L when the unit is zeroed.  L is the sum of -log p over the sample's answer tokens.  Samples are
combined by an L2 norm, so that signs do not cancel; the square of the score is the factor's empirical Fisher information.

Legend: B samples, T tokens, I inputs or channels, U units, D hidden, H query heads.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import decoder_layers
from models.calibration.observe import evaluating, hooked, on_device
from models.forward import answer_hidden, answer_labels
from models.losses import Objective, head_of, linear_objective
from models.pruning.scores.importance import ImportanceScores, Total, identity, unit_counts

_CROSS_ENTROPY = Objective({"cross_entropy": 1.0})


@torch.enable_grad()
def taylor_scores(
    model: PreTrainedModel, batches: Iterable[Batch], *, total: Total = identity, seed: int = 0
) -> ImportanceScores:
    """L2 norm over the samples of the slope of their loss in a factor on the unit; the batches' `labels` are used too.

    Factors of neurons act on the input of `down_proj`, those of heads and groups on the input of `o_proj`, and the one factor of a
    hidden channel on the outputs of all norms that read the residual stream, the final one included.
    """
    groups = [layer.num_kv_groups for layer in decoder_layers(model)]
    counts = unit_counts(model)
    squares = torch.zeros(sum(counts), dtype=torch.float64, device=model.device)
    with evaluating(model):
        for batch in on_device(batches, model.device):
            *slopes, hidden_BD = _slopes(model, batch)
            neurons, heads = slopes[: len(groups)], slopes[len(groups) :]
            of_groups = [
                head_BH.unflatten(1, (count, -1)).sum(-1) for head_BH, count in zip(heads, groups, strict=True)
            ]
            squares += torch.cat([slope_BU.square().sum(0) for slope_BU in (*neurons, *heads, *of_groups, hidden_BD)])
    return ImportanceScores.in_order(total(squares).sqrt().float().split(counts), len(groups))


def _slopes(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """Slopes (B, U) of each sample's loss in the factors: neurons of all layers, query heads of all layers, hidden channels."""
    layers = decoder_layers(model)
    samples = len(batch["input_ids"])

    def factors(units: int) -> Tensor:
        return torch.ones(samples, units, device=model.device, requires_grad=True)

    neurons = [factors(layer.num_neurons) for layer in layers]
    heads = [factors(layer.num_query_heads) for layer in layers]
    hidden = factors(model.config.hidden_size)
    readers = [(layer.down_proj, g) for layer, g in zip(layers, neurons, strict=True)]
    readers += [(layer.o_proj, g) for layer, g in zip(layers, heads, strict=True)]
    norms: list[Any] = [*(norm for layer in layers for norm in layer.stream_norms), model.base_model.norm]
    hooks = [reader.register_forward_pre_hook(_on_input(g)) for reader, g in readers]
    hooks += [norm.register_forward_hook(_on_output(hidden)) for norm in norms]
    with hooked(hooks):
        hidden_ND = answer_hidden(model, batch)
    head = head_of(model)
    fixed = replace(head, weight_VD=head.weight_VD.detach())  # no gradient of the largest matrix
    loss, _ = linear_objective(hidden_ND, fixed, None, answer_labels(batch), _CROSS_ENTROPY)
    return torch.autograd.grad(loss, [*neurons, *heads, hidden])


def _on_input(factors_BU: Tensor) -> Callable[..., tuple[Tensor]]:
    return lambda _, inputs: (_scaled(inputs[0], factors_BU),)


def _on_output(factors_BU: Tensor) -> Callable[..., Tensor]:
    return lambda _, inputs, output: _scaled(output, factors_BU)


def _scaled(x_BTI: Tensor, factors_BU: Tensor) -> Tensor:
    """Each unit times its factor, in float32 so that the slopes are sums in float32."""
    x_BTUW = x_BTI.float().unflatten(-1, (factors_BU.shape[1], -1))
    return (x_BTUW * factors_BU[:, None, :, None]).flatten(-2).to(x_BTI.dtype)
