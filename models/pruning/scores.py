"""Activation importance (Minitron, arXiv 2407.14679): units whose activations are small change the output least.

For every unit u the statistic of one sample is a_u = mean over its tokens of |x_u|; samples are combined by an L2 norm
("sequence mean, batch L2").  For neurons x is the input of `down_proj`; for a key/value group it is the L2 norm of the input
of `o_proj` over the group's query heads.  Forward passes only, statistics in float32, padding left out.

Legend: B samples, T tokens, M neurons, G key/value groups.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.architecture import DecoderLayer, decoder_layers


class ImportanceScores:
    """Scores of every neuron and key/value group of a model.

    Attributes:
        neurons: One float32 tensor (M,) per layer.
        kv_groups: One float32 tensor (G,) per layer.
    """

    def __init__(self, neurons: list[Tensor], kv_groups: list[Tensor]) -> None:
        self.neurons = neurons
        self.kv_groups = kv_groups


@torch.no_grad()
def activation_scores(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, total: Callable[[Tensor], Tensor] = lambda x: x
) -> ImportanceScores:
    """Collect activation importance over calibration batches (`input_ids`, `attention_mask`); the mode is left unchanged.

    Args:
        model: The model to judge.
        batches: Calibration batches; with several processes, those of this one.
        total: Sums a tensor over all processes, which gives the scores over all their batches.

    Raises:
        ValueError: There was no batch, or the model's family is unknown.
    """
    layers = decoder_layers(model)
    neuron_squares = [torch.zeros(layer.num_neurons, device=model.device) for layer in layers]
    group_squares = [torch.zeros(layer.num_kv_groups, device=model.device) for layer in layers]
    mask_BT = torch.empty(0)

    def observe_neurons(layer: DecoderLayer, x_BTM: Tensor) -> None:
        neuron_squares[layer.index] += _token_mean(x_BTM.abs().float(), mask_BT).square().sum(0)

    def observe_groups(layer: DecoderLayer, x_BTD: Tensor) -> None:
        norms_BTG = x_BTD.float().unflatten(-1, (layer.num_kv_groups, -1)).norm(dim=-1)
        group_squares[layer.index] += _token_mean(norms_BTG, mask_BT).square().sum(0)

    hooks = [_on_input(layer.mlp.down_proj, layer, observe_neurons) for layer in layers]
    hooks += [_on_input(layer.attention.o_proj, layer, observe_groups) for layer in layers]
    was_training = model.training
    model.eval()
    seen = 0
    try:
        for batch in batches:
            mask_BT = batch["attention_mask"].to(model.device)
            model.base_model(input_ids=batch["input_ids"].to(model.device), attention_mask=mask_BT, use_cache=False)
            seen += 1
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    if not seen:
        raise ValueError("expected at least one calibration batch, found none; raise calibration_batches to 1 or more")
    squares = neuron_squares + group_squares
    scores = total(torch.cat(squares)).sqrt().split([len(s) for s in squares])
    return ImportanceScores(list(scores[: len(layers)]), list(scores[len(layers) :]))


def top_indices(scores: Tensor, count: int) -> list[int]:
    """The indices of the `count` largest scores, ascending; ties go to the lower index."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


def _token_mean(x_BTU: Tensor, mask_BT: Tensor) -> Tensor:
    weights_BT1 = mask_BT.float().unsqueeze(-1)
    return (x_BTU * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)


def _on_input(module: nn.Module, layer: DecoderLayer, observe: Any) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_pre_hook(lambda _, inputs: observe(layer, inputs[0]))
