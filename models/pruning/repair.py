"""Repair after a cut: `o_proj` and `down_proj` of every layer are refitted, so that the student follows the model before the cut.

Layer after layer, both models read the same tokens.  The inputs of a projection are taken from the cut model; what it should give
is what still lacks between the cut model's residual stream and the dense model's.  So a projection compensates for what its own inputs
lost, what was lost before it, and the layers that were dropped after it.  (Where a norm stands between projection and stream, the
aim is the dense projection's output.)

Two kinds of inputs, in the words of OSSCAR (arXiv 2403.12983):

- `layerwise`: every layer reads the dense model's stream, so layers do not depend on each other;
- `sequential`: every layer reads the cut and repaired model's own stream, so that later layers correct earlier errors.

Tokens weigh 1 over the mean square of the dense stream: the next norm divides by its root, and the first token of many models has
a stream a hundred times larger than all others.  The ridge pulls towards the weights before the repair; a sequential fit needs a
strong one, as its aim holds errors that no input explains.

Legend: B samples, T tokens, S valid tokens, P inputs, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import DecoderLayer, decoder_layers
from models.calibration.least_squares import damped, moment, refit
from models.calibration.observe import evaluating, input_of, layer_arguments, on_device
from models.pruning.scores.importance import Total, identity
from models.structure.edits import Edit
from program.progress import Bar

Prefix = Literal["layerwise", "sequential"]


@dataclass
class _Reading:
    """One batch on its way through both models.

    Attributes:
        mask_BT: Which tokens are valid.
        arguments: What the dense model gives to each of its layers beside the hidden states.
        dense_BTD: The dense model's stream, at the next layer.
        cut_BTD: The cut model's stream, there.
        scale: The cut model's stream over the dense one's, where they agree; not 1 if Gemma has lost channels.
    """

    mask_BT: Tensor
    arguments: list[dict[str, Any]]
    dense_BTD: Tensor
    cut_BTD: Tensor
    scale: float


@torch.no_grad()
def repair(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    edits: Sequence[Edit],
    batches: Sequence[Batch],
    *,
    prefix: Prefix,
    ridge: float,
    total: Total = identity,
) -> None:
    """Fit `o_proj` and `down_proj` of every layer of a cut model, in place.

    `prefix`: see the top of this module.  `ridge` is the share of the mean diagonal of X^T X that pulls towards the
    present weights.

    Raises:
        ValueError: There was no batch, or too few tokens for this ridge.
    """
    old, new = decoder_layers(dense), decoder_layers(model)
    gone = {index for edit in edits if edit["op"] == "drop_layers" for index in edit["layers"]}
    stays = [index for index in range(len(old)) if index not in gone]
    channels = next((torch.tensor(edit["keep"]) for edit in edits if edit["op"] == "narrow_hidden"), slice(None))
    with evaluating(dense), evaluating(model):
        readings = [_read(dense, model, batch, channels) for batch in on_device(batches, model.device)]
        for reading in readings:  # layers dropped before the first that stays
            for index in range(stays[0]):
                reading.dense_BTD = old[index].block(reading.dense_BTD, **reading.arguments[index])
        steps = zip(stays, [*stays[1:], len(old)], new, strict=True)
        for start, end, layer in Bar(list(steps), desc="Pruning: repairing", unit="layers", leave=False):
            if prefix == "layerwise":
                for reading in readings:
                    reading.cut_BTD = reading.scale * reading.dense_BTD[..., channels]
            _repair_layer(layer, old[start:end], readings, channels, ridge, total)


def _read(dense: PreTrainedModel, model: PreTrainedModel, batch: Batch, channels: Tensor | slice) -> _Reading:
    """The streams at the first layer, and the arguments of all layers, from one forward pass of the dense model."""
    stream_BTD, arguments = layer_arguments(dense, [layer.block for layer in decoder_layers(dense)], batch)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    scale = float(embedded.norm() / stream_BTD[..., channels].norm())
    return _Reading(batch["attention_mask"].bool(), arguments, stream_BTD, embedded, scale)


@dataclass
class _Half:
    """Attention or MLP of a layer, seen from the projection that writes to the stream, and the norm between the two."""

    linear: Any
    norm: Callable[[Tensor], Tensor] | None

    def written(self, input_BTP: Tensor) -> Tensor:
        """What reaches the stream from an input of the projection."""
        output_BTD: Tensor = self.linear(input_BTP)
        return output_BTD if self.norm is None else self.norm(output_BTD)


def _halves(layer: DecoderLayer) -> tuple[_Half, _Half]:
    norms = layer.output_norms or (None, None)
    return _Half(layer.o_proj, norms[0]), _Half(layer.down_proj, norms[1])


def _repair_layer(
    layer: DecoderLayer,
    replaced: Sequence[DecoderLayer],
    readings: Sequence[_Reading],
    channels: Tensor | slice,
    ridge: float,
    total: Total,
) -> None:
    """Fit one layer of the cut model to the dense layer in its place and the dropped ones after it; move both streams on."""
    dense = replaced[0]
    for half, (ours, theirs) in enumerate(zip(_halves(layer), _halves(dense), strict=True)):
        fit, inputs = _Fit(ours, ridge), []
        for reading in readings:
            if half == 0:
                arguments = reading.arguments[dense.index]
                dense_input = input_of(theirs.linear, dense.block, reading.dense_BTD, **arguments)
                inputs.append(input_of(ours.linear, layer.block, reading.cut_BTD, **arguments))
            else:
                dense_input = input_of(theirs.linear, dense.mlp, dense.stream_norms[1](reading.dense_BTD))
                inputs.append(input_of(ours.linear, layer.mlp, layer.stream_norms[1](reading.cut_BTD)))
            output_BTD = theirs.linear(dense_input)
            reading.dense_BTD = reading.dense_BTD + theirs.written(dense_input)
            for dropped in replaced[1:] if half else ():
                reading.dense_BTD = dropped.block(reading.dense_BTD, **reading.arguments[dropped.index])
            fit.add(inputs[-1], output_BTD[..., channels], reading, channels)
        fit.solve(total)
        for reading, input_BTP in zip(readings, inputs, strict=True):
            reading.cut_BTD = reading.cut_BTD + ours.written(input_BTP)


class _Fit:
    """The least-squares problem of one projection, summed up batch by batch."""

    def __init__(self, half: _Half, ridge: float) -> None:
        self.half, self.ridge = half, ridge
        weight_DP = half.linear.weight
        self.gram_PP = torch.zeros(2 * weight_DP.shape[1:], dtype=torch.float64, device=weight_DP.device)
        self.product_PD = torch.zeros(weight_DP.shape[::-1], dtype=torch.float64, device=weight_DP.device)

    def add(self, input_BTP: Tensor, dense_output_BTD: Tensor, reading: _Reading, channels: Tensor | slice) -> None:
        """Add a batch, whose dense stream is already behind this half and whose cut stream is still before it."""
        mask_BT, dense_SD = reading.mask_BT, reading.dense_BTD[reading.mask_BT].float()
        aim_SD = dense_output_BTD[mask_BT].float()
        if self.half.norm is None:
            aim_SD = dense_SD[:, channels] - reading.cut_BTD[mask_BT].float()
        if self.half.linear.bias is not None:
            aim_SD = aim_SD - self.half.linear.bias.float()
        root_S1 = dense_SD.square().mean(1, keepdim=True).rsqrt()
        input_SP = input_BTP[mask_BT].float() * root_S1
        self.gram_PP += moment(input_SP, input_SP)
        self.product_PD += moment(input_SP, aim_SD * root_S1)

    def solve(self, total: Total) -> None:
        """Give the projection the weights that fit best."""
        weight_DP = self.half.linear.weight
        gram_PP, product_PD = total(self.gram_PP), total(self.product_PD)
        hessian_PP = damped(gram_PP, self.ridge)
        pull_PP = hessian_PP - gram_PP
        product_PD = product_PD + pull_PP @ weight_DP.T.double()
        weight_DP.copy_(refit(hessian_PP, product_PD, torch.arange(len(gram_PP))).T)
