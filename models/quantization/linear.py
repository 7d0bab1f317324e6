"""Linear layers whose weight and input pass through a fake quantizer.

A quantizer first *observes* (records the largest magnitude, passes values through unchanged), then is *frozen* (one fixed
scale).  State lives in buffers only, so it travels in `state_dict` with the weights: a resume never calibrates again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.quantization.fp8 import fake_quantize_fp8, scale_from_amax


class FakeQuantizer(nn.Module):
    """Per-tensor FP8 E4M3 fake quantizer: observes until `freeze`, then rounds to a fixed grid.

    Attributes:
        amax: Scalar float32 buffer, largest magnitude observed so far.
        scale: Scalar float32 buffer, dequantization multiplier; 0 while observing.
    """

    amax: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("amax", torch.zeros(()))
        self.register_buffer("scale", torch.zeros(()))
        self.frozen = False  # mirrors `scale > 0` without asking the device for it at every call

    def freeze(self) -> None:
        """Fix the scale from what was observed.

        Raises:
            ValueError: Nothing was observed.
        """
        if not self.amax > 0:
            raise ValueError(
                "expected a quantizer that has observed data, found one with a range of 0; run calibration batches first"
            )
        self.scale.copy_(scale_from_amax(self.amax))
        self.frozen = True

    def forward(self, x: Tensor) -> Tensor:
        """Round x to the frozen grid; before, pass it on, observed in training mode (validation must not set scales)."""
        if self.frozen:
            return fake_quantize_fp8(x, self.scale)
        if self.training:
            self.amax.copy_(torch.maximum(self.amax, x.detach().abs().amax().float()))
        return x

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.frozen = bool(self.scale > 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FakeQuantizer":
        """Follow the model to another device but stay in float32: `.half()` must not change the numerics."""
        amax, scale = self.amax, self.scale
        super()._apply(fn, recurse)
        self.amax, self.scale = amax.to(self.amax.device), scale.to(self.scale.device)
        return self


class FakeQuantizedLinear(nn.Module):
    """A linear layer with fake-quantized weight and input; it owns the *same* `Parameter` objects as the original.

    Args:
        linear: The layer to take over; its weight and bias keep their identity, so optimizers go on with them.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.input_quantizer = FakeQuantizer()
        self.weight_quantizer = FakeQuantizer()
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """X W^T + b with x and W on their grids."""
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)

    @property
    def in_features(self) -> int:
        """Columns of the weight, which pruning may change."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight, which pruning may change."""
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        """As for `nn.Linear`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def quantized_linears(model: nn.Module) -> dict[str, FakeQuantizedLinear]:
    """Every fake-quantized layer of a model by its qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizedLinear)}


def freeze_scales(model: nn.Module) -> int:
    """Freeze every quantizer that still observes; weights are measured as they are now.  Returns how many were frozen."""
    frozen = 0
    for linear in quantized_linears(model).values():
        if not linear.weight_quantizer.frozen:
            linear.weight_quantizer.amax.copy_(linear.weight.detach().abs().amax().float())
        for quantizer in (linear.input_quantizer, linear.weight_quantizer):
            if not quantizer.frozen:
                quantizer.freeze()
                frozen += 1
    return frozen


def merge_observations(model: nn.Module, maximum: Callable[[Tensor], Tensor]) -> None:
    """Let every quantizer that still observes know what its counterparts in other processes have seen.

    Args:
        model: Model with fake-quantized layers, the same ones in every process.
        maximum: Elementwise maximum of a tensor over all processes.
    """
    quantizers = [q for q in model.modules() if isinstance(q, FakeQuantizer) and not q.frozen]
    if quantizers:
        for quantizer, amax in zip(quantizers, maximum(torch.stack([q.amax for q in quantizers])), strict=True):
            quantizer.amax.copy_(amax)
