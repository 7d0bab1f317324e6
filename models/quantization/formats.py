"""Number formats: what values a quantized layer may hold, and how many of them share a scale.

| format                 | weights (O, I)                         | inputs                              | where it is fast                     |
|------------------------|----------------------------------------|-------------------------------------|--------------------------------------|
| `fp8_e4m3`             | FP8, one scale                         | FP8, one calibrated scale           | TensorRT engines fuse it             |
| `fp8_e4m3_per_channel` | FP8, one scale a row                   | FP8, one scale a token, found live  | vLLM, SGLang on FP8 GPUs             |
| `int8`                 | INT8, one scale a row                  | INT8, one scale a token, found live | CPUs with VNNI / AMX, INT8 GPUs      |
| `int8_static`          | INT8, one scale a row                  | INT8, one calibrated scale          | TensorRT engines                     |
| `int8_weight_only`     | INT8, one scale a row                  | as they are                         | memory-bound decoding                |
| `int8_g32|64|128`      | INT8, one scale a group of inputs      | as they are                         | memory-bound decoding, ONNX Runtime  |
| `int4_g32|64|128`      | INT4, one scale a group                | as they are                         | memory-bound decoding                |
| `int4_g32|64|128_zp`   | INT4, one scale and zero point a group | as they are                         | memory-bound decoding                |

INT4 and INT8 are symmetric where no zero point is named.
"""

from dataclasses import dataclass
from typing import Literal

Numbers = Literal["fp8_e4m3", "int8", "int4"]
FormatName = Literal[
    "fp8_e4m3",
    "fp8_e4m3_per_channel",
    "int8",
    "int8_static",
    "int8_weight_only",
    "int8_g32",
    "int8_g64",
    "int8_g128",
    "int4_g32",
    "int4_g64",
    "int4_g128",
    "int4_g32_zp",
    "int4_g64_zp",
    "int4_g128_zp",
]
RANGES: dict[str, tuple[float, float]] = {"fp8_e4m3": (-448, 448), "int8": (-128, 127), "int4": (-8, 7)}
BITS = {"fp8_e4m3": 8, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Grid:
    """The grid that one tensor is rounded to: code * scale, or (code - zero point) * scale.

    Attributes:
        numbers: The codes: FP8 numbers, or the integers of 8 or 4 bits.
        scales: Who shares a scale: all of the tensor, each of its rows (output channel of a weight, token of an input), or
            `group_size` neighbours in a row.
        group_size: For groups only.
        zero_point: Whether groups have one; it is a code.
    """

    numbers: Numbers
    scales: Literal["tensor", "row", "group"] = "tensor"
    group_size: int = 0
    zero_point: bool = False

    @property
    def low(self) -> float:
        """The smallest code."""
        return RANGES[self.numbers][0]

    @property
    def high(self) -> float:
        """The largest code; scales map the largest magnitude onto it."""
        return RANGES[self.numbers][1]

    def bits(self) -> float:
        """Stored bits of a value, with its share of scales (16 bits each) and zero points."""
        shared = 16 + (BITS[self.numbers] if self.zero_point else 0)
        return BITS[self.numbers] + (shared / self.group_size if self.scales == "group" else 0)


@dataclass(frozen=True)
class Format:
    """How a linear layer is quantized.

    Attributes:
        weight: Grid of the weight.
        input: Grid of the input; None: left as it is.  One scale per tensor is calibrated, one per row is found at every call.
    """

    weight: Grid
    input: Grid | None = None


FORMATS: dict[str, Format] = {
    "fp8_e4m3": Format(Grid("fp8_e4m3"), Grid("fp8_e4m3")),
    "fp8_e4m3_per_channel": Format(Grid("fp8_e4m3", "row"), Grid("fp8_e4m3", "row")),
    "int8": Format(Grid("int8", "row"), Grid("int8", "row")),
    "int8_static": Format(Grid("int8", "row"), Grid("int8")),
    "int8_weight_only": Format(Grid("int8", "row")),
    **{f"int8_g{size}": Format(Grid("int8", "group", size)) for size in (32, 64, 128)},
    **{f"int4_g{size}": Format(Grid("int4", "group", size)) for size in (32, 64, 128)},
    **{f"int4_g{size}_zp": Format(Grid("int4", "group", size, zero_point=True)) for size in (32, 64, 128)},
}


def format_of(name: str) -> Format:
    """A format by its name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in FORMATS:
        raise ValueError(
            f"expected a quantization format among {', '.join(FORMATS)}, found {name!r}; choose one of these"
        )
    return FORMATS[name]
