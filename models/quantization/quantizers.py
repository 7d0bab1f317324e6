"""Fake quantizers as modules: of weights, of inputs with a calibrated scale, of inputs with a scale found at every call.

A quantizer passes values through until it is *frozen*; from then on it rounds.  Its state lives in buffers, and in a parameter where
its scale is learned, so it travels in `state_dict` with the weights: a resume never calibrates again.

Legend: O outputs, I inputs, N rows, H histogram bins.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.quantization.fake_quantize import codes_of, fake_quantize
from models.quantization.formats import Grid
from models.quantization.lsq import fake_quantize_learned, log_of
from models.quantization.scales import (
    NUM_BINS,
    Search,
    amax_from_histogram,
    histogram_of,
    scale_from_amax,
    weight_scales,
)


class FakeQuantizer(nn.Module):
    """What all quantizers share.

    Args:
        grid: The grid that values are rounded to.
        shape: Shape of the scales.

    Attributes:
        scale: Float32 buffer, dequantization multipliers; 0 until frozen.
        zero_point: Int8 buffer of codes, only for grids with zero points.
        frozen: Whether it rounds.
        log_scale: Parameter of the shape of `scale`, only where the scale is learned: its logarithm, see `lsq.py`.
        has_own_scales: Whether `scale` holds scales that could be learned.
        followed: Whether what it rounds is multiplied when a learned scale moves, see `lsq.py`.
    """

    scale: Tensor
    zero_point: Tensor | None
    log_scale: nn.Parameter | None
    has_own_scales = True

    def __init__(self, grid: Grid, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("scale", torch.zeros(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int8) if grid.zero_point else None)
        self.register_parameter("log_scale", None)
        self.followed = False
        self.frozen = False  # mirrors `scale > 0` without asking the device for it at every call

    def set_scales(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Take these scales for good, or to start learning from."""
        self.scale.copy_(scale)
        if self.zero_point is not None:
            assert zero_point is not None
            self.zero_point.copy_(zero_point)
        if self.log_scale is not None:
            self.log_scale.data.copy_(log_of(self.scale))
        self.frozen = True

    def learn_scale(self) -> None:
        """Make the scale trainable.  Frozen scales stay as they are; others come with a state dict, as the logarithm does."""
        self.log_scale = nn.Parameter(log_of(self.scale))

    def quantize(self, x: Tensor) -> Tensor:
        """Round x to the grid if frozen; else x itself."""
        if not self.frozen:
            return x
        if self.log_scale is None or not torch.is_grad_enabled():  # exports see the one operator in both cases
            return fake_quantize(x, self.scale, self.zero_point, *self._layout())
        factor = (self._sharing(x) * self.grid.high) ** -0.5
        return fake_quantize_learned(
            x, self.scale, self.log_scale, factor, self.zero_point, *self._layout(), self.followed
        )

    def codes(self, x: Tensor) -> Tensor:
        """The codes of x: float8_e4m3fn, or int8 for all integers."""
        return codes_of(x, self.scale, self.zero_point, *self._layout())

    def forward(self, x: Tensor) -> Tensor:
        """See `quantize`."""
        return self.quantize(x)

    def _layout(self) -> tuple[str, int, int]:
        return self.grid.numbers, 0, self.grid.group_size

    def _sharing(self, x: Tensor) -> int:
        """How many values share a scale; of the last group of a row, how many would."""
        return {"tensor": x.numel(), "row": x.shape[-1], "group": self.grid.group_size}[self.grid.scales]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.frozen = bool((self.scale > 0).all())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FakeQuantizer":
        """Follow the model to another device but stay in float32: `.half()` must not change the numerics."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        log_scale = None if self.log_scale is None else self.log_scale.data
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)  # type: ignore[union-attr]
        if self.log_scale is not None and log_scale is not None:
            self.log_scale.data = log_scale.to(self.log_scale.device)
        return self


class WeightQuantizer(FakeQuantizer):
    """Quantizer of a weight, of which only the shape counts."""

    def __init__(self, grid: Grid, weight_OI: Tensor) -> None:
        outputs, inputs = weight_OI.shape
        groups = -(-inputs // max(grid.group_size, 1))
        shapes = {"tensor": (), "row": (outputs,), "group": (outputs, groups)}
        super().__init__(grid, shapes[grid.scales])

    def freeze(self, weight_OI: Tensor, search: Search = "max") -> None:
        """Fix the scales from the weight as it is now."""
        self.set_scales(*weight_scales(weight_OI, self.grid, search))


class InputQuantizer(FakeQuantizer):
    """Quantizer of a layer's input with one calibrated scale: it observes in training mode until it is frozen.

    What it sees waits in `pending` until `merge` adds it to the buffers, together with what the other processes saw: DDP
    overwrites the buffers of all processes with those of the first one at every forward pass.

    Args:
        grid: Its grid.

    Attributes:
        amax: Scalar float32 buffer, the largest magnitude observed.
        histogram: (H,) int64 buffer, see `histogram_of`.
        pending: Both of them, for what is not merged yet.
    """

    amax: Tensor
    histogram: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.register_buffer("amax", torch.zeros(()))
        self.register_buffer("histogram", torch.zeros(NUM_BINS, dtype=torch.int64))
        self.pending: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Round x; before, pass it on, observed in training mode (validation must not set scales)."""
        if self.training and not self.frozen:
            self._observe(x.detach())
        return self.quantize(x)

    def merge(self, seen: tuple[Tensor, Tensor] | None = None) -> None:
        """Add observations: what all processes saw, or what this one did."""
        seen = self.pending if seen is None else seen
        if seen is not None:
            self.amax.copy_(torch.maximum(self.amax, seen[0]))
            self.histogram.add_(seen[1])
        self.pending = None

    def freeze(self, search: Search = "max") -> None:
        """Fix the scale from what was observed.

        Raises:
            ValueError: Nothing was observed.
        """
        self.merge()
        if not self.amax > 0:
            raise ValueError(
                "expected a quantizer that has observed data, found one with a range of 0; run calibration batches first"
            )
        amax = amax_from_histogram(self.histogram, self.amax, self.grid, search)
        self.set_scales(scale_from_amax(amax, self.grid.high))

    def _sharing(self, x: Tensor) -> int:
        """The features of a token, so that it does not matter how tokens are divided into micro-batches."""
        return x.shape[-1]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.merge()  # so that a checkpoint holds all that was seen
        super()._save_to_state_dict(*args, **kwargs)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        amax, histogram = self._largest(x), histogram_of(x)
        if self.pending is not None:
            amax, histogram = torch.maximum(self.pending[0], amax), self.pending[1] + histogram
        self.pending = amax, histogram

    def _largest(self, x: Tensor) -> Tensor:
        return x.abs().amax().float()


class RowQuantizer(FakeQuantizer):
    """Quantizer of a layer's input with a scale for each token, computed at every call.

    Its buffer `scale` holds a 1 once it is frozen, and nothing else.
    """

    has_own_scales = False

    def freeze(self, search: Search = "max") -> None:
        """Round from now on."""
        self.set_scales(torch.ones(()))

    def quantize(self, x: Tensor) -> Tensor:
        """Round each row of the last dimension to its own grid."""
        if not self.frozen:
            return x
        rows_NI = x.flatten(0, -2)
        return fake_quantize(rows_NI, row_scales(rows_NI.detach(), self.grid), None, self.grid.numbers).view(x.shape)


def row_scales(rows_NI: Tensor, grid: Grid) -> Tensor:
    """The scale (N,) that maps each row's largest magnitude onto the largest code, in operators that ONNX has too."""
    return rows_NI.float().abs().amax(dim=-1).div(grid.high).clamp(min=2.0**-24)


def input_quantizer(grid: Grid | None) -> InputQuantizer | RowQuantizer | None:
    """The quantizer for an input with this grid."""
    if grid is None:
        return None
    return InputQuantizer(grid) if grid.scales == "tensor" else RowQuantizer(grid)
