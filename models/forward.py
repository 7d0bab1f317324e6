"""Next-token logits of a batch at the answer positions, and only there: the head is the most expensive layer of a small model.

Legend: B samples, T tokens, N answer tokens (of the whole batch), V vocabulary, D hidden.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from datamodules.collate import IGNORE_INDEX, Batch
from models.hardware.attention import right_padded
from models.hardware.sharding import call_gathered
from models.losses.output_head import LazyLogits, logits_of


def answer_labels(batch: Batch) -> Tensor:
    """The answer tokens of a batch in order, shape (N,): labels shifted to the positions that predict them."""
    labels_BT: Tensor = batch["labels"][:, 1:]
    return labels_BT[_before_answers(batch)]


def answer_lengths(batch: Batch) -> list[int]:
    """Answer tokens of each sample."""
    if _asks_labels(batch):
        lengths: list[int] = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).tolist()
        return lengths
    return [sum(end - max(start, 1) for start, end in spans) for spans in batch["answer_spans"]]


def _before_answers(batch: Batch) -> tuple[Tensor, ...]:
    """Rows and columns (N,) of the positions that predict answer tokens."""
    if _asks_labels(batch):
        return (batch["labels"][:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    at = [
        (row, column)
        for row, spans in enumerate(batch["answer_spans"])
        for start, end in spans
        for column in range(max(start, 1) - 1, end - 1)
    ]
    return torch.tensor(at).reshape(-1, 2).T.to(batch["labels"].device, non_blocking=True).unbind()


def _asks_labels(batch: Batch) -> bool:
    """On a GPU, labels say where answers are only to a host that waits: there, the loader says it."""
    return batch["labels"].device.type == "cpu" or "answer_spans" not in batch


def answer_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states at the positions that predict answer tokens, shape (N, D), in the order of `answer_labels`."""
    return answer_states(model, batch)[0]


def answer_states(model: PreTrainedModel, batch: Batch, layers: Iterable[int] = ()) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states as `answer_hidden`, and the outputs (N, D) of some decoder layers, counted from 0.

    As everywhere in transformers, the output of the last layer is taken after the final norm.

    Raises:
        ValueError: There is no such layer.
    """
    return call_gathered(model, _answer_states, model, batch, list(layers))


def _answer_states(model: PreTrainedModel, batch: Batch, layers: list[int]) -> tuple[Tensor, list[Tensor]]:
    with right_padded():
        output = model.base_model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=bool(layers),
        )
    before_answers = _before_answers(batch)
    states = output.hidden_states[1:] if layers else ()  # without the embeddings
    if layers and not 0 <= min(layers) <= max(layers) < len(states):
        raise ValueError(
            f"expected decoder layers between 0 and {len(states) - 1}, found {layers}; change model.hidden_state_layers"
        )
    return output.last_hidden_state[before_answers], [states[layer][before_answers] for layer in layers]


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits that predict the answer tokens, shape (N, V)."""
    return logits_of(model, answer_hidden(model, batch))


def lazy_logits(model: PreTrainedModel, batch: Batch, vocabulary: int | None = None) -> LazyLogits:
    """The same, computed some rows at a time, over the first tokens of the vocabulary."""
    vocabulary = vocabulary or len(model.get_output_embeddings().weight)
    return LazyLogits(answer_hidden(model, batch), partial(logits_of, model), vocabulary)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """From now on, training keeps each decoder layer's input only and runs the layer again in the backward pass.

    Evaluation mode is not affected.  Dropout draws the same numbers both times.
    """
    # transformers' public name for this changed within version 5, and it also hooks the embeddings, which only re-entrant
    # checkpoints need.
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
