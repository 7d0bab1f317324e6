"""Sensitivity of the loss to an error at each token, for every tensor that linear layers read.

Rounding weights changes the outputs of a linear layer at token t by e_t.  To second order that costs 1/2 (g_t . e_t)^2 nats on
average, with the gradient g_t of the log-likelihood of labels that the model draws itself.  A Gram matrix that weighs each token's
input with |g_t|^2 therefore counts errors where they matter, and not where inputs are merely large, as at the first token of a text
(the idea of GuidedQuant, arXiv 2505.07004, with one weight a token instead of one for each group of outputs).

Legend: B samples, T tokens, N answer tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import DecoderLayer, decoder_layers
from models.calibration.observe import evaluating, hooked
from models.forward import answer_hidden
from models.generation.sampling import seed_of
from models.losses.output_head import logits_of, pieces_of

_TOKENS_AT_ONCE = 512  # a token of SmolLM2-135M takes 1.3 MB, one of a model of 500M parameters 2.6
_READ = ("input_ids", "attention_mask", "labels")


def readers_of(layer: DecoderLayer) -> list[list[nn.Module]]:
    """The linear layers of a decoder layer in the order in which data meets them; those that read the same tensor together."""
    attention = [getattr(layer.attention, name) for name in layer.family.qkv]
    mlp = [getattr(layer.mlp, name) for name in layer.family.gate_up]
    return [attention, [layer.o_proj], mlp, [layer.down_proj]]


def token_weights(model: PreTrainedModel, batch: Batch, *, seed: int = 0) -> list[list[Tensor]]:
    """For every decoder layer, and in it for each entry of `readers_of`: |g_t|^2 over the outputs of these layers, (B, T) float32.

    Padding has weight 0.  The model, its mode and its gradients are left unchanged.

    The batch is on the model's device, with `labels`; the seed is that of the labels that are drawn.
    """
    readers = [group for layer in decoder_layers(model) for group in readers_of(layer)]
    mask_BT = batch["attention_mask"].bool()
    generator = torch.Generator(device=mask_BT.device).manual_seed(seed_of("sensitivity", seed))
    rows = max(1, _TOKENS_AT_ONCE // mask_BT.shape[1])
    pieces = [
        _weights_of_piece(model, {key: batch[key][start : start + rows] for key in _READ}, readers, generator)
        for start in range(0, len(mask_BT), rows)
    ]
    weights = [torch.cat(piece).masked_fill(~mask_BT, 0.0) for piece in zip(*pieces, strict=True)]
    return [weights[start : start + 4] for start in range(0, len(weights), 4)]


def _weights_of_piece(
    model: PreTrainedModel, batch: Batch, readers: Sequence[Sequence[nn.Module]], generator: torch.Generator
) -> list[Tensor]:
    """|g_t|^2 for each group of readers; activations and gradients of all layers are held meanwhile."""
    linears = [linear for group in readers for linear in group]
    with evaluating(model), torch.enable_grad(), passing(linears) as seen:
        hidden_ND = answer_hidden(model, batch)
        found = label_gradients(model, hidden_ND, [output for _, output in seen.values()], generator)
    gradients = dict(zip(seen, found, strict=True))
    return [_squares(group, gradients) for group in readers]


@contextmanager
def passing(linears: Iterable[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Input and output of every linear layer in the last forward pass; outputs take part in differentiation."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:  # the first layers of a frozen model
            output = output.detach().requires_grad_()
        seen[linear] = inputs[0], output
        return output

    with hooked(linear.register_forward_hook(note) for linear in linears):
        yield seen


def label_gradients(
    model: PreTrainedModel, hidden_ND: Tensor, outputs: Sequence[Tensor], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Gradients in the outputs of the negative log-likelihood of labels drawn from the model, summed over answer tokens."""
    gradients: list[Tensor] = []
    for rows in pieces_of(len(hidden_ND), len(model.get_output_embeddings().weight)):
        piece_nD = hidden_ND[rows].detach().requires_grad_()
        logits_nV = logits_of(model, piece_nD).float()
        labels_n = torch.multinomial(logits_nV.detach().softmax(-1), 1, generator=generator).squeeze(1)
        gradients += torch.autograd.grad(F.cross_entropy(logits_nV, labels_n, reduction="sum"), piece_nD)
    return torch.autograd.grad(hidden_ND, list(outputs), torch.cat([hidden_ND[:0], *gradients]))


def _squares(linears: Sequence[nn.Module], gradients: dict[nn.Module, Tensor]) -> Tensor:
    return torch.stack([gradients[linear].float().square().sum(-1) for linear in linears]).sum(0)
