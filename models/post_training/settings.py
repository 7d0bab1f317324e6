"""Settings of quantization after training, and their defaults by format."""

from dataclasses import dataclass
from typing import Annotated, Literal

from models.post_training.smoothing import STRENGTHS
from models.quantization.formats import format_of
from models.quantization.scales import Search
from program.ranges import Between, Positive, check_fields

Method = Literal["nearest", "gptq", "quantease"]


@dataclass(frozen=True)
class PostTrainingQuantization:
    """How a model is quantized after training.

    Attributes:
        method: How weights are rounded: `nearest`, `gptq`, or `quantease`, which starts from `gptq` and takes three times as long;
            see `models/post_training/rounding.py`.
        weight_search: How scales of weights are chosen: `max` or `mse`.
        input_search: How calibrated scales of inputs are chosen: `max`, `percentile` or `mse`.
        smoothing: Strengths that the search for smoothing factors tries; empty: no smoothing; None: `STRENGTHS` where it was
            found to help, which is where inputs are rounded to integers, and where weights alone are rounded to nearest, or to 8 bits:
            then most is lost by inputs in kernels that round them.
        sensitive: Tokens count by what the predictions owe to them, which takes a backward pass; otherwise all alike.
        compensate: Each layer compensates for the rounding errors of earlier ones, which takes a second forward pass; None: where it was found to
            help, which is where a solver rounds weights alone.
        damping: Share of the mean diagonal of a Gram matrix that is added to it.
        sweeps: Passes of `quantease`, at most.
        smoothing_tokens: Calibration tokens on which smoothing factors are tried, at most.

    Raises:
        ValueError: A number is out of its range.
    """

    method: Method = "quantease"
    weight_search: Search = "mse"
    input_search: Search = "mse"
    smoothing: tuple[float, ...] | None = None
    sensitive: bool = True
    compensate: bool | None = None
    damping: Annotated[float, Between(0, 1000)] = 0.01
    sweeps: Positive = 4
    smoothing_tokens: Positive = 512

    def __post_init__(self) -> None:
        check_fields(self)

    def strengths(self, format: str) -> tuple[float, ...]:
        """The strengths that the search for smoothing factors tries where layers have this format."""
        if self.smoothing is not None:
            return self.smoothing
        weights, inputs = format_of(format).weight, format_of(format).input
        if inputs is not None:
            helps = inputs.numbers != "fp8_e4m3"
        else:
            helps = self.method == "nearest" or weights.numbers == "int8"
        return STRENGTHS if helps else ()

    def compensates(self, format: str) -> bool:
        """Whether layers of this format compensate for the rounding errors of earlier ones."""
        if self.compensate is not None:
            return self.compensate
        return self.method != "nearest" and format_of(format).input is None
