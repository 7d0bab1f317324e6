"""Inspects the network that TensorRT's parser makes of a graph: its layers by type, its matrix products by the types of their operands."""

from collections import Counter
from types import ModuleType
from typing import Any


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
