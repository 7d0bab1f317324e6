"""Cuts channels of the residual stream: equivalent to the old model with those channels zeroed.

Zero is meant of everything that is written over the hidden size: the embedding and the outputs of `o_proj` and `down_proj`.  A norm
over D channels of which D' are kept divides by the mean over D, and over D' afterwards, though the sum of squares is the same.  The
cut compensates by

- the gain of the norms that read the residual stream: times sqrt(D / D');
- epsilon, which stands beside that mean: times D / D'.

Gemma scales its embedding by sqrt(hidden size), a factor that every load takes from the config.  So its stream becomes c = sqrt(D'/D)
times what it was.  The norms on the stream then need the same gain but the old epsilon, and what layers add must shrink by c, which is
just what their output norms do when left alone.

A config has one epsilon for all norms.  The norms on the stream get what they need; those of the heads (Qwen 3) take the same new one,
and Gemma's output norms keep the old one, which makes a relative difference of about epsilon / (mean square of their input).
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from models.architecture import decoder_layers, gain_offset
from models.structure.sizes import sync_config
from models.structure.slicing import checked_indices, narrow_linear, narrow_parameter


def narrow_hidden(model: PreTrainedModel, optimizers: Sequence[Optimizer] = (), *, keep: Sequence[int]) -> None:
    """Keep these channels of the residual stream, ascending indices; see `models.structure.layers` for what all cuts have in common.

    Raises:
        ValueError: There is no such channel.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    layers = decoder_layers(model)
    stream_norms: list[Any] = [*(norm for layer in layers for norm in layer.stream_norms), model.base_model.norm]
    output_norms = [norm for layer in layers for norm in layer.output_norms]
    size = embedding.weight.shape[1]
    channels = checked_indices(keep, size, "narrow_hidden to keep channels of the residual stream")
    share = len(channels) / size
    for parameter in {embedding.weight, head.weight}:  # one, where they are tied
        narrow_parameter(parameter, channels, 1, optimizers)
    if isinstance(head, nn.Linear):
        head.in_features = len(channels)
    for layer in layers:
        for owner, name in layer.linears():
            linear = getattr(owner, name)
            writes = linear is layer.o_proj or linear is layer.down_proj
            narrow_linear(linear, channels, 0 if writes else 1, optimizers)
    for norm in (*stream_norms, *output_norms):
        narrow_parameter(norm.weight, channels, 0, optimizers)
    for norm in stream_norms:
        offset = gain_offset(norm)
        norm.weight.data.copy_((norm.weight.data.float() + offset) * share**-0.5 - offset)
    if hasattr(embedding, "embed_scale"):
        embedding.scalar_embed_scale = len(channels) ** 0.5
        embedding.embed_scale.fill_(embedding.scalar_embed_scale)
    else:
        model.config.rms_norm_eps *= 1 / share
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = model.config.rms_norm_eps
    sync_config(model)
