"""Checks that TensorRT's parsed network has a quantized matrix product for every quantized layer.

Strongly typed networks keep the types of the file, so that a product between two DequantizeLinear of FP8 is what the compiler
fuses.  What it chose in the end only a GPU can tell.
"""

from collections import Counter

from transformers import PreTrainedModel

from export.verify.checks import Check
from models.quantization.formats import Grid
from models.quantization.linear import FakeQuantizedLinear, quantized_linears

_TENSORRT_NAMES = {"fp8_e4m3": "FP8", "int8": "INT8", "int4": "INT4"}


def audit(model: PreTrainedModel, products: dict[str, int], engine: str) -> Check:
    """Whether the network has a quantized product for every quantized layer of the model.

    Args:
        model: With the quantizers that were exported.
        products: What `export.engine.parsed_layers.inspect` counted.
        engine: What to call it, such as its precision.
    """
    wanted = Counter(_operands(linear) for linear in quantized_linears(model).values())
    missing = {name: (count, products.get(name, 0)) for name, count in wanted.items() if products.get(name, 0) < count}
    found = ", ".join(f"{count} {name}" for name, count in sorted(products.items()))
    return Check(
        name=f"engine {engine}, quantized products in the parsed network",
        status="failed" if missing else "passed",
        reason=f"expected {'; '.join(f'{count} {name}, found {has}' for name, (count, has) in missing.items())}"
        if missing
        else None,
        note=f"products with a weight: {found}; which kernels were chosen for them only a GPU can tell",
    )


def _operands(linear: FakeQuantizedLinear) -> str:
    quantizer = linear.input_quantizer
    return f"{_type(quantizer.grid) if quantizer is not None else 'HALF'} x {_type(linear.weight_quantizer.grid)}"


def _type(grid: Grid) -> str:
    return _TENSORRT_NAMES[grid.numbers]
