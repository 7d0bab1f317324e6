"""Scales for a model that was not trained with quantizers: observe conversations, then freeze.

Training with the quantizers in place (`QuantizationAwareTraining`) costs less accuracy; this takes a minute.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.chat import encode, truncate
from datamodules.collate import collate, pad_id_of
from datamodules.files import read_conversations
from models.quantization.formats import FormatName
from models.quantization.linear import freeze_scales, merge_observations, quantized_linears
from models.quantization.scales import Search
from models.structure import apply_edit, quantize_decoder

BATCH_SIZE = 8


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Path,
    *,
    format: FormatName = "fp8_e4m3",
    search: Search = "max",
    num_conversations: int = 128,
    max_length: int = 512,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Insert quantizers into a model, in place, and fix their scales from the first conversations of a file.

    Args:
        model: Without quantizers, or with quantizers that still observe.
        tokenizer: With a chat template.
        conversations: JSONL or Parquet file with `messages`, or `prompt` and `response`.
        format: Format of quantizers that are inserted.
        search: How ranges are found, see `models/quantization/scales.py`.
        num_conversations: How many to observe.
        max_length: Tokens kept of each.
        on_step: Called after each batch of eight.

    Raises:
        FileNotFoundError, ValueError: The file is missing, broken or empty.
    """
    records = read_conversations(str(conversations), default_split="train")[:num_conversations]
    examples = [truncate(example, max_length=max_length) for example in encode(tokenizer, records)]
    kept = [example for example in examples if example is not None]
    if not kept:
        raise ValueError(
            f"expected conversations of at most {max_length} tokens before their answer in {str(conversations)!r}, found none; "
            "choose others"
        )
    if not quantized_linears(model):
        apply_edit(model, quantize_decoder(model, format))
    model.train()  # quantizers observe in training mode only
    for start in range(0, len(kept), BATCH_SIZE):
        batch = collate(kept[start : start + BATCH_SIZE], pad_id=pad_id_of(tokenizer))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        merge_observations(model)
        on_step()
    freeze_scales(model, search)
    model.eval()
