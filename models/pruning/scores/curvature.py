"""Second-order statistics of the projections that write to the residual stream, over calibration batches.

For `o_proj` and `down_proj` of every layer: the Gram matrix of the inputs, and the Fisher information of the outputs, which weighs an
error there by what it does to the model's predictions.  The Fisher takes labels that the model draws itself at the answer positions
(not the data's, which would give the empirical Fisher).

With both, 1/2 tr(d^T gram d fisher) estimates the KL divergence in nats per answer token that a change d of the weights causes.

Legend: B samples, T tokens, S valid tokens, N answer tokens, P inputs, D hidden, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import decoder_layers
from models.calibration.least_squares import moment
from models.calibration.observe import evaluating, hooked, on_device
from models.forward import answer_hidden
from models.generation.sampling import seed_of
from models.losses.output_head import logits_of, pieces_of
from models.pruning.scores.importance import Total, identity
from program.progress import Bar

# Batches from one backward pass to the next: a matrix of the hidden size needs fewer tokens than one of all neurons.
FISHER_EVERY = 4


@dataclass(frozen=True)
class Curvature:
    """Statistics of one projection, float64.

    Attributes:
        gram_PP: Sum over tokens of x x^T, per answer token.
        fisher_DD: Mean over the tokens of each `FISHER_EVERY`-th batch of g g^T, where g is the gradient of the summed negative log-likelihood; None if not asked for.
    """

    gram_PP: Tensor
    fisher_DD: Tensor | None


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
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    fisher: bool = True,
    seed: int = 0,
    total: Total = identity,
) -> list[LayerCurvature]:
    """Statistics of all decoder layers; the model, its gradients and its mode are left unchanged.

    Args:
        model: The model to judge.
        batches: Calibration batches; with several processes, those of this one.
        fisher: Also collect the Fisher information, which needs a backward pass.
        seed: Of the labels that are drawn.
        total: Sums a tensor over all processes.

    Raises:
        ValueError: There was no batch with an answer token.
    """
    layers = decoder_layers(model)
    linears = [linear for layer in layers for linear in (layer.o_proj, layer.down_proj)]
    sums = [_Sums(linear, model.device) for linear in linears]
    counts = torch.zeros(2, dtype=torch.float64, device=model.device)  # answer tokens; valid tokens with gradients
    with evaluating(model), _inputs_of(linears) as inputs:
        for number, batch in enumerate(
            Bar(on_device(batches, model.device), desc="Pruning: statistics", unit="batches", leave=False)
        ):
            mask_BT = batch["attention_mask"].bool()
            learns = fisher and number % FISHER_EVERY == 0
            gradients = None
            with torch.set_grad_enabled(learns):
                hidden_ND = answer_hidden(model, batch)
                if learns:
                    outputs = [output for _, output in inputs.values()]
                    gradients = _gradients(model, hidden_ND, outputs, seed_of("fisher", seed, number))
            counts += torch.tensor([len(hidden_ND), int(mask_BT.sum()) * learns], device=model.device)
            for index, (linear, linear_sums) in enumerate(zip(linears, sums, strict=True)):
                linear_sums.add(mask_BT, inputs[linear][0].detach(), gradients[index] if gradients else None)
            inputs.clear()
    answers, tokens = total(counts).tolist()
    if not answers:
        raise ValueError(
            "expected calibration batches with answer tokens, found none; raise calibration_batches to 1 or more"
        )
    found = [
        Curvature(total(s.gram_PP).cpu() / answers, total(s.fisher_DD).cpu() / tokens if fisher else None) for s in sums
    ]
    return [LayerCurvature(o_proj, down_proj) for o_proj, down_proj in zip(found[::2], found[1::2], strict=True)]


def _gradients(model: PreTrainedModel, hidden_ND: Tensor, outputs: list[Tensor], seed: int) -> list[Tensor]:
    """Gradients of the negative log-likelihood of labels drawn from the model, summed over answer tokens."""
    generator = torch.Generator(device=hidden_ND.device).manual_seed(seed)
    gradients: list[Tensor] = []
    for rows in pieces_of(len(hidden_ND), len(model.get_output_embeddings().weight)):
        piece_nD = hidden_ND[rows].detach().requires_grad_()
        logits_nV = logits_of(model, piece_nD).float()
        labels_n = torch.multinomial(logits_nV.detach().softmax(-1), 1, generator=generator).squeeze(1)
        gradients += torch.autograd.grad(F.cross_entropy(logits_nV, labels_n, reduction="sum"), piece_nD)
    return list(torch.autograd.grad(hidden_ND, outputs, torch.cat([hidden_ND[:0], *gradients])))


@contextmanager
def _inputs_of(linears: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Input and output of every linear layer in the last forward pass; outputs take part in differentiation."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:  # the first layer of a frozen model
            output = output.detach().requires_grad_()
        seen[linear] = inputs[0], output
        return output

    with hooked(linear.register_forward_hook(note) for linear in linears):
        yield seen
