"""Copies of a student's weights for decoding: several linear layers as one matrix, laid out for many products.

Legend: R flat rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.quantization.linear import FakeQuantizedLinear


class Weights:
    """One matrix for all linear layers that read the same tensor; those with quantized inputs are called one after the other.

    All layers have a bias, or none; the copy is in `dtype`.
    """

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype) -> None:
        self.quantized = any(getattr(linear, "input_quantizer", None) is not None for linear in linears)
        self.linears, self.sizes = linears, [len(linear.weight) for linear in linears]
        first = linears[0].weight
        self.weight = torch.empty(sum(self.sizes), first.shape[1], dtype=dtype, device=first.device)
        for part, linear in zip(self.weight.split(self.sizes), linears, strict=True):
            part.copy_(_rounded_weight(linear))
        has_bias = getattr(linears[0], "bias", None) is not None
        self.bias = torch.cat([linear.bias.detach().to(dtype) for linear in linears]) if has_bias else None
        self.packed = not self.quantized and _can_pack(self.weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x_RD: Tensor, added_to: Tensor | None = None) -> Tensor:
        """The product, of rows in two dimensions; added to another tensor of its shape, if there is one."""
        if self.packed:
            if added_to is None:
                return torch.ops.mkldnn._linear_pointwise.default(x_RD, self.weight, self.bias, "none", [], "")
            return torch.ops.mkldnn._linear_pointwise.binary(x_RD, added_to, self.weight, self.bias, "add")
        product = self._quantized(x_RD) if self.quantized else F.linear(x_RD, self.weight, self.bias)
        return product if added_to is None else product.add_(added_to)

    def _quantized(self, x_RD: Tensor) -> Tensor:
        biases = [None] * len(self.sizes) if self.bias is None else self.bias.split(self.sizes)
        parts = zip(self.linears, self.weight.split(self.sizes), biases, strict=True)
        return torch.cat([F.linear(_rounded_input(x_RD, linear), w, b) for linear, w, b in parts], dim=-1)


class Norm:
    """A copy of an RMSNorm; a product in float32 would be cast back at once, so the weight has the type of the computation."""

    def __init__(self, norm: Any, dtype: torch.dtype) -> None:
        self.weight, self.epsilon = norm.weight.detach().to(dtype, copy=True), norm.variance_epsilon
        self.doubled = torch.cat([self.weight, self.weight])

    def __call__(self, x: Tensor) -> Tensor:
        """The norm over the last dimension."""
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        # On a CPU rms_norm is ten small calls, layer_norm is one: of x and -x, the mean is 0 and the variance the mean square.
        doubled = torch.cat([x, -x], dim=-1)
        return torch.layer_norm(doubled, self.doubled.shape, self.doubled, None, self.epsilon).narrow(
            -1, 0, x.shape[-1]
        )


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can lay a matrix out once for many products, as torch's own compiler does for inference."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@torch.no_grad()  # where scales are learned, the rounded weight would have a gradient
def _rounded_weight(linear: Any) -> Tensor:
    weight: Tensor = linear.weight.detach()
    return linear.weight_quantizer(weight) if isinstance(linear, FakeQuantizedLinear) else weight


def _rounded_input(x: Tensor, linear: Any) -> Tensor:
    """What a layer's quantizer does in evaluation mode: a rollout must not set the scales of a student in training."""
    quantizer = getattr(linear, "input_quantizer", None)
    return x if quantizer is None else quantizer.quantize(x)
