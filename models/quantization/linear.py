"""Linear layers whose weight, and input where the format says so, pass through a fake quantizer."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.quantization.formats import format_of
from models.quantization.quantizers import FakeQuantizer, InputQuantizer, RowQuantizer, WeightQuantizer, input_quantizer
from models.quantization.scales import Search


class FakeQuantizedLinear(nn.Module):
    """A linear layer with fake-quantized weight and input; it owns the *same* `Parameter` objects as the original.

    Args:
        linear: The layer to take over; its weight and bias keep their identity, so optimizers go on with them.
        format: Name of a format in `models/quantization/formats.py`.

    Raises:
        ValueError: No such format.
    """

    input_quantizer: InputQuantizer | RowQuantizer | None

    def __init__(self, linear: nn.Linear, format: str = "fp8_e4m3") -> None:
        super().__init__()
        self.format = format
        self.weight = linear.weight
        self.bias = linear.bias
        self.input_quantizer = input_quantizer(format_of(format).input)
        self.weight_quantizer = WeightQuantizer(format_of(format).weight, linear.weight)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """X W^T + b with x and W on their grids."""
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)

    def quantizers(self) -> Iterator[FakeQuantizer]:
        """Those of the input, if any, and of the weight."""
        if self.input_quantizer is not None:
            yield self.input_quantizer
        yield self.weight_quantizer

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
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}"


def quantized_linears(model: nn.Module) -> dict[str, FakeQuantizedLinear]:
    """Every fake-quantized layer of a model by its qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizedLinear)}


def rounds_inputs(model: nn.Module) -> bool:
    """Whether some layer rounds its input, or keys and values, so that two correct runs of the model may decide differently."""
    return any(isinstance(module, InputQuantizer | RowQuantizer) for module in model.modules())


@torch.no_grad()
def freeze_weights(model: nn.Module, search: Search = "max") -> int:
    """Freeze every weight quantizer that is not; weights are measured as they are now.  Returns how many were frozen."""
    waiting = [linear for linear in quantized_linears(model).values() if not linear.weight_quantizer.frozen]
    for linear in waiting:
        linear.weight_quantizer.freeze(linear.weight, search)
    return len(waiting)


@torch.no_grad()
def freeze_inputs(model: nn.Module, search: Search = "max") -> int:
    """Freeze every quantizer of inputs, keys and values that still observes.  Returns how many were frozen.

    Raises:
        ValueError: One of them has observed nothing.
    """
    waiting = [m for m in model.modules() if isinstance(m, InputQuantizer | RowQuantizer) and not m.frozen]
    for quantizer in waiting:
        quantizer.freeze(search)
    return len(waiting)


def freeze_scales(model: nn.Module, search: Search = "max") -> int:
    """Freeze every quantizer that is not.  Returns how many were frozen."""
    return freeze_inputs(model, search) + freeze_weights(model, search)


Reduce = Callable[[Tensor, str], Tensor]  # of a tensor over all processes, by "max" or "sum"


def merge_observations(model: nn.Module, reduce: Reduce = lambda x, operation: x) -> None:
    """Add what this process observed since the last call, and what its counterparts did, to the buffers of all."""
    observers = [m for m in model.modules() if isinstance(m, InputQuantizer) and not m.frozen]
    if not observers:
        return
    nothing = observers[0].amax.new_zeros(()), observers[0].histogram.new_zeros(len(observers[0].histogram))
    seen = [q.pending or nothing for q in observers]
    amaxes = reduce(torch.stack([amax for amax, _ in seen]), "max")
    histograms = reduce(torch.stack([histogram for _, histogram in seen]), "sum")
    for quantizer, amax, histogram in zip(observers, amaxes, histograms, strict=True):
        quantizer.merge((amax, histogram))
