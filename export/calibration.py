"""Quantization of a model that was not trained with quantizers: from conversations, in minutes.

Training with the quantizers in place (`QuantizationAwareTraining`) costs less accuracy.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.chat import encode, truncate
from datamodules.collate import collate, pad_id_of
from datamodules.files import read_conversations
from models.forward import Batch
from models.quantization.linear import freeze_scales, quantized_linears
from models.quantization.post_training import PostTrainingQuantization, quantize_after_training

BATCH_SIZE = 8


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Path,
    settings: PostTrainingQuantization,
    *,
    num_conversations: int = 128,
    max_length: int = 512,
    on_layer: Callable[[], None] = lambda: None,
) -> None:
    """Quantize a model, in place, after the first conversations of a file.

    Args:
        model: Without quantizers; with some that still observe, they see the conversations and are frozen, and `settings` do not matter.
        tokenizer: With a chat template.
        conversations: JSONL or Parquet file with `messages`, or `prompt` and `response`.
        settings: Format and method.
        num_conversations: How many to read.
        max_length: Tokens kept of each.
        on_layer: Called after each decoder layer.

    Raises:
        FileNotFoundError, ValueError: The file is missing, broken or empty.
    """
    batches = _batches(tokenizer, conversations, num_conversations, max_length)
    if quantized_linears(model):
        _observe(model, batches)
    else:
        quantize_after_training(model, batches, settings, on_layer=lambda _: on_layer())
    model.eval()


def _batches(tokenizer: PreTrainedTokenizerBase, conversations: Path, number: int, max_length: int) -> list[Batch]:
    records = read_conversations(str(conversations), default_split="train")[:number]
    examples = [truncate(example, max_length=max_length) for example in encode(tokenizer, records)]
    kept = sorted((example for example in examples if example is not None), key=len)
    if not kept:
        raise ValueError(
            f"expected conversations of at most {max_length} tokens before their answer in {str(conversations)!r}, found none; "
            "choose others"
        )
    pad_id = pad_id_of(tokenizer)
    return [{**collate(kept[start : start + BATCH_SIZE], pad_id=pad_id)} for start in range(0, len(kept), BATCH_SIZE)]


@torch.no_grad()
def _observe(model: PreTrainedModel, batches: list[Batch]) -> None:
    model.train()  # quantizers observe in training mode only
    for batch in batches:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    freeze_scales(model)
