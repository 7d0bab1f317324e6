"""The arms of the quantization study: our ways to quantize after training, and for each format what others make of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.quantization.peers import Peer
from datamodules.collate import Batch
from models.architecture import decoder_layers, head_name
from models.post_training.calibrate import quantize_after_training
from models.post_training.format_choice import UNQUANTIZED, formats_by_pattern
from models.post_training.settings import Method, PostTrainingQuantization
from models.post_training.smoothing import STRENGTHS
from models.quantization.cache import CacheFormat
from models.quantization.formats import FORMATS
from models.quantization.scales import Search


@dataclass(frozen=True)
class Arm:
    """One of our ways; see `models.post_training.calibrate`."""

    format: str
    method: Method = "nearest"
    search: Search = "max"  # of the scales of weights and of inputs
    smoothing: bool | None = False  # of channels, first; None: where it helps
    sensitive: bool = False
    compensate: bool = False
    kv_cache: CacheFormat | None = None  # of keys and values, if they are rounded

    @property
    def name(self) -> str:
        """For files and tables."""
        smoothed = {True: ", smoothed", False: "", None: ", smoothed where it helps"}[self.smoothing]
        if self.format == UNQUANTIZED:
            return f"cache {self.kv_cache}, {self.search}"
        added = ", sensitive" * self.sensitive + ", compensating" * self.compensate
        return f"{self.method}, {self.search}{smoothed}{added}"

    def quantize(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Quantize a model in place."""
        settings = PostTrainingQuantization(
            smoothing={True: STRENGTHS, False: (), None: None}[self.smoothing],
            method=self.method,
            weight_search=self.search,
            input_search=self.search,
            sensitive=self.sensitive,
            compensate=self.compensate,
        )
        formats = formats_by_pattern(model, UNQUANTIZED, {}) if self.format == UNQUANTIZED else self.format
        with tqdm(total=len(decoder_layers(model)), desc="Layers", unit="layer", leave=False) as bar:
            quantize_after_training(
                model, batches, formats, settings, kv_cache=self.kv_cache, on_layer=lambda _: bar.update()
            )


@dataclass(frozen=True)
class HeadArm:
    """The output head alone is rounded."""

    head: str
    method: Method = "nearest"
    sensitive: bool = False
    format: str = UNQUANTIZED  # of the decoder's projections

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"head {self.head}, {self.method}, mse{', sensitive' * self.sensitive}"

    def quantize(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Quantize the head in place."""
        formats = formats_by_pattern(model, UNQUANTIZED, {head_name(model): self.head})
        settings = PostTrainingQuantization(method=self.method, sensitive=self.sensitive)
        quantize_after_training(model, batches, formats, settings)


INT4 = "int4_g128"  # of SmolLM2-135M's 576 channels, the last group has 64, ours as ModelOpt's

_MODELOPT = "nvidia-modelopt"
_FP8 = Peer("fp8_e4m3", _MODELOPT, "FP8_DEFAULT_CFG")
_FP8_PER_CHANNEL = Peer("fp8_e4m3_per_channel", _MODELOPT, "FP8_PER_CHANNEL_PER_TOKEN_CFG")
_INT8 = Peer("int8", "torchao", "Int8DynamicActivationInt8WeightConfig")
_AWQ = Peer(INT4, _MODELOPT, "INT4_AWQ_CFG")


def best(format: str) -> Arm:
    """The defaults of `PostTrainingQuantization`."""
    compensate = PostTrainingQuantization().compensates(format)
    return Arm(format, "quantease", "mse", smoothing=None, sensitive=True, compensate=compensate)


# Name of a ratio of KLs -> what is above and below the line.
COMPARISONS: dict[str, tuple[Arm | Peer, Arm | Peer]] = {
    "fp8_kl": (best(_FP8.format), _FP8),
    "fp8_per_channel_kl": (best(_FP8_PER_CHANNEL.format), _FP8_PER_CHANNEL),
    "int8_kl": (best(_INT8.format), _INT8),
    "int4_kl": (best(INT4), _AWQ),
    "int4_kl_over_nearest": (best(INT4), Arm(INT4)),
}

PEERS = (
    _FP8,
    _FP8_PER_CHANNEL,
    _INT8,
    Peer("int8_static", _MODELOPT, "INT8_DEFAULT_CFG"),
    Peer("int8_static", _MODELOPT, "INT8_SMOOTHQUANT_CFG"),
    Peer("int8_weight_only", "torchao", "Int8WeightOnlyConfig"),
    *(
        peer
        for format in ("int4_g32", "int4_g64", "int4_g128")
        for peer in (
            Peer(format, _MODELOPT, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
            Peer(format, _MODELOPT, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "gptq"),
            Peer(format, _MODELOPT, "INT4_AWQ_CFG"),
            *(
                [Peer(format, "torchao", "IntxWeightOnlyConfig")] if format != INT4 else []
            ),  # it needs a multiple of groups
        )
    ),
)
_STATIC = ("fp8_e4m3", "int8_static")  # inputs with a calibrated scale
_SEARCHES: tuple[Search, ...] = ("max", "mse")
_HEADS = (
    HeadArm("int4_g64"),
    HeadArm("int4_g64", "gptq"),
    HeadArm("int4_g64", "quantease"),
    HeadArm("int4_g64", "quantease", sensitive=True),
)
_CACHES: tuple[Arm | Peer, ...] = tuple(
    Arm(UNQUANTIZED, search=search, kv_cache=kv_cache) for kv_cache in get_args(CacheFormat) for search in _SEARCHES
)
ARMS: dict[str, tuple[Arm | HeadArm | Peer, ...]] = {UNQUANTIZED: (*_CACHES, *_HEADS)} | {
    format: (
        Arm(format),  # the control; each of the next adds one thing to the one before
        Arm(format, search="mse"),
        Arm(format, search="mse", smoothing=None),
        Arm(format, "gptq", "mse", smoothing=None),
        Arm(format, "quantease", "mse", smoothing=None),
        *dict.fromkeys([Arm(format, "quantease", "mse", smoothing=None, sensitive=True), best(format)]),
        *([Arm(format, search="percentile")] if format in _STATIC else []),
        *(peer for peer in PEERS if peer.format == format),
    )
    for format in FORMATS
}
