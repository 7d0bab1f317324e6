"""Second-order statistics of the projections that write to the residual stream, over calibration batches.

For `o_proj` and `down_proj` of every layer: the Gram matrix of the inputs, and the Fisher information of the outputs, which weighs an
error there by what it does to the model's predictions.  The Fisher takes labels that the model draws itself at the answer positions
(not the data's, which would give the empirical Fisher).

With both, 1/2 tr(d^T gram d fisher) estimates the KL divergence in nats per answer token that a change d of the weights causes.

Legend: B samples, T tokens, S valid tokens, N answer tokens, P inputs, D hidden.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import decoder_layers
from models.calibration.least_squares import moment
from models.calibration.observe import evaluating, on_device
from models.calibration.sensitivity import label_gradients, passing
from models.forward import answer_hidden
from models.generation.sampling import seed_of
from models.pruning.scores.importance import Total, identity
from program.progress import Bar

# Batches from one backward pass to the next: a matrix of the hidden size needs fewer tokens than one of all neurons.
FISHER_EVERY = 4


@dataclass(frozen=True)
class Curvature:
    """Statistics of one projection, float64.

    Attributes:
        gram_PP: Sum over tokens of x x^T, per answer token.
        fisher_DD: Mean over the tokens of each `FISHER_EVERY`-th batch of g g^T, where g is the gradient of the summed negative
            log-likelihood.
    """

    gram_PP: Tensor
    fisher_DD: Tensor


@dataclass(frozen=True)
class LayerCurvature:
    """Statistics of the two projections of a decoder layer."""

    o_proj: Curvature
    down_proj: Curvature


class _Sums:
    """What is summed up for one projection."""

    def __init__(self, linear: nn.Module, device: torch.device) -> None:
        num_outputs, num_inputs = linear.weight.shape  # type: ignore[union-attr, misc]
        self.gram_PP = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.fisher_DD = torch.zeros(num_outputs, num_outputs, dtype=torch.float64, device=device)

    def add(self, mask_BT: Tensor, input_BTP: Tensor, gradient_BTD: Tensor | None) -> None:
        input_SP = input_BTP[mask_BT]
        self.gram_PP += moment(input_SP, input_SP)
        if gradient_BTD is not None:
            gradient_SD = gradient_BTD[mask_BT]
            self.fisher_DD += moment(gradient_SD, gradient_SD)


def collect_curvature(
    model: PreTrainedModel, batches: Iterable[Batch], *, seed: int = 0, total: Total = identity
) -> list[LayerCurvature]:
    """Statistics of all decoder layers; the model, its gradients and its mode are left unchanged.

    The seed is that of the labels that are drawn.

    Raises:
        ValueError: There was no batch with an answer token.
    """
    layers = decoder_layers(model)
    linears = [linear for layer in layers for linear in (layer.o_proj, layer.down_proj)]
    sums = [_Sums(linear, model.device) for linear in linears]
    counts = torch.zeros(2, dtype=torch.float64, device=model.device)  # answer tokens; valid tokens with gradients
    with evaluating(model), passing(linears) as seen:
        for number, batch in enumerate(
            Bar(on_device(batches, model.device), desc="Pruning: statistics", unit="batches", leave=False)
        ):
            mask_BT = batch["attention_mask"].bool()
            learns = number % FISHER_EVERY == 0
            gradients: Sequence[Tensor | None] = [None] * len(linears)
            with torch.set_grad_enabled(learns):
                hidden_ND = answer_hidden(model, batch)
                if learns:
                    generator = torch.Generator(device=model.device).manual_seed(seed_of("fisher", seed, number))
                    gradients = label_gradients(model, hidden_ND, [output for _, output in seen.values()], generator)
            counts += torch.tensor([len(hidden_ND), int(mask_BT.sum()) * learns], device=model.device)
            for linear, linear_sums, gradient_BTD in zip(linears, sums, gradients, strict=True):
                linear_sums.add(mask_BT, seen[linear][0].detach(), gradient_BTD)
            seen.clear()
    answers, tokens = total(counts).tolist()
    if not answers:
        raise ValueError(
            "expected calibration batches with answer tokens, found none; raise calibration_batches to 1 or more"
        )
    found = [Curvature(total(s.gram_PP).cpu() / answers, total(s.fisher_DD).cpu() / tokens) for s in sums]
    return [LayerCurvature(o_proj, down_proj) for o_proj, down_proj in zip(found[::2], found[1::2], strict=True)]
