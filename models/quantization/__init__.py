"""Number formats and fake quantization."""

from models.quantization.fake_quantize import codes_of, fake_quantize
from models.quantization.formats import FORMATS, Format, Grid, format_of
from models.quantization.linear import (
    FakeQuantizedLinear,
    freeze_inputs,
    freeze_scales,
    freeze_weights,
    merge_observations,
    quantized_linears,
)
from models.quantization.quantizers import FakeQuantizer, InputQuantizer, RowQuantizer, WeightQuantizer
from models.quantization.scales import scale_from_amax, weight_scales

__all__ = [
    "FORMATS",
    "FakeQuantizedLinear",
    "FakeQuantizer",
    "Format",
    "Grid",
    "InputQuantizer",
    "RowQuantizer",
    "WeightQuantizer",
    "codes_of",
    "fake_quantize",
    "format_of",
    "freeze_inputs",
    "freeze_scales",
    "freeze_weights",
    "merge_observations",
    "quantized_linears",
    "scale_from_amax",
    "weight_scales",
]
