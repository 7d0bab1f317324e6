"""Quantization of a model that was not trained with quantizers: from conversations, in minutes.

Training with the quantizers in place (`QuantizationAwareTraining`) costs less accuracy.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.calibration import batches_from
from datamodules.collate import Batch
from export.folders.student import without_quantizers
from export.phases import Phases
from models.architecture import decoder_layers
from models.post_training.calibrate import quantize_after_training
from models.post_training.format_choice import UNQUANTIZED, formats_by_pattern, formats_by_sensitivity
from models.post_training.settings import PostTrainingQuantization
from models.quantization.cache import CacheFormat
from models.quantization.linear import freeze_scales
from models.quantization.quantizers import FakeQuantizer
from models.structure.adapters import merged

_SENSITIVITY_BATCHES = 4
_DEFAULT = PostTrainingQuantization()


@dataclass(frozen=True)
class Calibration:
    """From what, and to what, a model is quantized after training.

    Attributes:
        conversations: JSONL or Parquet file with `messages`, or `prompt` and `response`.
        formats: Number formats by patterns of names of projections, such as {"*": "int4_g64", "*.down_proj": "int8_g64"}; the last
            pattern that fits decides, and `none`, or no pattern that fits, leaves a projection as it is.  The output head is meant by
            its name only.
        average_bits: Instead of patterns: bits a weight, on average, shared out by measured sensitivity.
        candidates: Weight-only formats that may be chosen for that.
        settings: How weights are rounded and scales are found.
        kv_cache: Format of keys and values in the cache; None: floating point.
        cpu_format: Of a copy for CPUs, which is quantized apart; None: there is none.
        num_conversations: How many to read.
        max_length: Tokens kept of each.
    """

    conversations: Path
    formats: Mapping[str, str] = field(default_factory=dict)
    average_bits: float | None = None
    candidates: tuple[str, ...] = ("int4_g128", "int4_g64", "int4_g32", "int8_g64", UNQUANTIZED)
    settings: PostTrainingQuantization = field(default_factory=PostTrainingQuantization)
    kv_cache: CacheFormat | None = None
    cpu_format: str | None = None
    num_conversations: int = 128
    max_length: int = 512

    @property
    def of_the_model(self) -> bool:
        """Whether the model itself gets formats, too, and not the copy for CPUs alone."""
        return bool(self.formats or self.average_bits or self.kv_cache)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    *,
    check: Callable[[Mapping[str, str], str | None], None],
) -> PreTrainedModel | None:
    """Quantize a model, in place, after the first conversations of a file; returns the copy for CPUs, if there is one.

    Args:
        model: Without quantizers; with some that still observe, they see the conversations and are frozen, and formats and settings do
            not matter.  If a copy is asked for, one that has its scales is left as it is.
        tokenizer: With a chat template.
        calibration: What to do.
        check: Called with the format of each projection and of the cache before anything is changed; it raises for what it refuses.

    Raises:
        FileNotFoundError, ValueError: The file is missing, broken or empty; no such format; or all scales are found already.
    """
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
    finished = bool(quantizers) and all(quantizer.frozen for quantizer in quantizers)
    if finished and calibration.cpu_format is None:
        raise ValueError(
            f"expected a model without scales to calibrate, found {len(quantizers)} quantizers that have theirs from training or an "
            "earlier calibration; leave --calibration out, or name the student before it was quantized"
        )
    file, num_layers = calibration.conversations, len(decoder_layers(model))
    batches = batches_from(
        file, tokenizer, num_conversations=calibration.num_conversations, max_length=calibration.max_length
    )
    for_cpu = None
    if calibration.cpu_format is not None:
        with Phases().phase(f"Quantizing for the CPU after {file}", num_layers) as on_layer:
            for_cpu = requantized(model, batches, calibration.cpu_format, calibration.settings, on_layer=on_layer)
        if finished or not calibration.of_the_model:
            return for_cpu
    with Phases().phase(f"Quantizing after {file}", num_layers) as on_layer:
        if quantizers:
            _observe(model, batches)
        else:
            formats, kv_cache = _choose(model, batches, calibration), calibration.kv_cache
            check(formats, kv_cache)
            quantize_after_training(
                model, batches, formats, calibration.settings, kv_cache=kv_cache, on_layer=lambda _: on_layer()
            )
        model.eval()
    return for_cpu


def _choose(model: PreTrainedModel, batches: list[Batch], calibration: Calibration) -> dict[str, str]:
    if calibration.average_bits is None:
        return formats_by_pattern(model, UNQUANTIZED, calibration.formats)
    some = batches[:: -(-len(batches) // _SENSITIVITY_BATCHES)]
    return formats_by_sensitivity(model, some, calibration.candidates, calibration.average_bits)


def requantized(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    format: str,
    settings: PostTrainingQuantization = _DEFAULT,
    *,
    on_layer: Callable[[], None] = lambda: None,
) -> PreTrainedModel:
    """A copy of a model with all projections in a format, and none of the quantizers that the model has."""
    other = copy.deepcopy(without_quantizers(merged(model))).requires_grad_(False)
    quantize_after_training(other, batches, format, settings, on_layer=lambda _: on_layer())
    return other.eval()


@torch.no_grad()
def _observe(model: PreTrainedModel, batches: list[Batch]) -> None:
    model.train()  # quantizers observe in training mode only
    for batch in batches:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    freeze_scales(model)
