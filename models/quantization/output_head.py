"""Quantization of the output head: which formats it may have, and its own copy of a tied weight.

In a small model the head is much of what a decoding step reads: a fifth of SmolLM2-135M.  Its codes cannot be those of the embedding it is
tied to, as what is best for one is not for the other, so a quantized head has a weight of its own.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from models.quantization.formats import format_of


def check_head_format(format: str) -> None:
    """Raise `ValueError` for a format that rounds inputs: losses multiply with the head's weight, piece by piece."""
    if format_of(format).input is not None:
        raise ValueError(
            f"expected a weight-only format for the output head, found {format}, which rounds its input too; choose int8_weight_only, int8_g* "
            "or int4_g*"
        )


def untie_head(model: PreTrainedModel, optimizers: Sequence[Optimizer] = ()) -> None:
    """Give the head a weight of its own, in place, if it is the embedding's; optimizers train it with the last of their first group.

    A new optimizer over the model's parameters numbers them in the same way, so a checkpoint's state fits.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    for optimizer in optimizers if head.weight.requires_grad else ():
        optimizer.param_groups[0]["params"].append(head.weight)
