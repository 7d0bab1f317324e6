"""Number formats and fake quantization."""

from models.quantization.fp8 import E4M3_MAX, fake_quantize_fp8, scale_from_amax
from models.quantization.linear import (
    FakeQuantizedLinear,
    FakeQuantizer,
    freeze_scales,
    merge_observations,
    quantized_linears,
)

__all__ = [
    "E4M3_MAX",
    "FakeQuantizedLinear",
    "FakeQuantizer",
    "fake_quantize_fp8",
    "freeze_scales",
    "merge_observations",
    "quantized_linears",
    "scale_from_amax",
]
