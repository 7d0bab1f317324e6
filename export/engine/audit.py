"""Which matrix products of a network are quantized, as TensorRT read it: a product that was wanted in FP8 and is not must not hide.

Strongly typed networks keep the types of the file, so that a product between two DequantizeLinear of FP8 is what the compiler
fuses.  What it chose in the end only a GPU can tell.
"""

from collections import Counter
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from export.verify.checks import Check
from models.quantization.formats import Grid
from models.quantization.linear import FakeQuantizedLinear, quantized_linears

_TENSORRT_NAMES = {"fp8_e4m3": "FP8", "int8": "INT8", "int4": "INT4"}


def inspect(trt: ModuleType, network: Any) -> dict[str, Any]:
    """Count the layers of a parsed network by type, and its matrix products with a weight by the types of their operands."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}

    def origin(tensor: Any) -> Any:
        """The layer that made a tensor, behind changes of its shape."""
        layer = producers.get(tensor.name)
        while layer is not None and layer.type == trt.LayerType.SHUFFLE:
            layer = producers.get(layer.get_input(0).name)
        return layer

    def is_weight(layer: Any) -> bool:
        if layer is not None and layer.type == trt.LayerType.DEQUANTIZE:
            layer = origin(layer.get_input(0))
        return layer is not None and layer.type == trt.LayerType.CONSTANT

    def numbers(tensor: Any) -> str:
        layer = origin(tensor)
        dequantized = layer is not None and layer.type == trt.LayerType.DEQUANTIZE
        name: str = (layer.get_input(0) if dequantized else tensor).dtype.name
        return name

    products = [
        f"{numbers(layer.get_input(0))} x {numbers(layer.get_input(1))}"
        for layer in layers
        if layer.type == trt.LayerType.MATRIX_MULTIPLY and is_weight(origin(layer.get_input(1)))
    ]
    return {
        "layers": dict(Counter(layer.type.name for layer in layers)),
        "matrix_multiplies": len(products),
        "products": dict(Counter(products)),
    }


def audit(model: PreTrainedModel, products: dict[str, int], engine: str) -> Check:
    """Whether the network has a quantized product for every quantized layer of the model.

    Args:
        model: With the quantizers that were exported.
        products: What `inspect` counted.
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
