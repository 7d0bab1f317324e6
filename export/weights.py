"""Filling the weights into an unrolled graph, each in the form in which it is cheapest to store and to multiply.

- Weights of matrix products are stored transposed, so that the graph multiplies them as they lie.
- Fake-quantized weights are stored as FLOAT8E4M3FN, directly followed by DequantizeLinear: one byte a weight, and the form
  that engines turn into FP8 matrix products.  Their codes are a cast of what training rounds by arithmetic; tests hold the two to the same bits.
- A tensor with several uses (tied embeddings) is stored once.
- Projections that read the same tensor with the same scale (query, key and value; gate and up) share its quantization.
"""

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from models.quantization.fp8 import E4M3_MAX

DATA_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values.")


def fp8_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """The float8_e4m3fn tensor whose values times `scale` are `fake_quantize_fp8(weight, scale)`."""
    return (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def bind_weights(onnx_model: ir.Model, model: nn.Module) -> None:
    """Replace the parameter inputs of a graph, in place, by initializers with the values of `model`.

    Args:
        onnx_model: Result of `repeat_layers`; its floating point type decides that of the weights and scales.
        model: Owner of the parameters and buffers of those names.
    """
    graph = onnx_model.graph
    parameters = [value for value in graph.inputs if not (value.name or "").startswith(DATA_INPUTS)]
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for value in parameters:
        graph.inputs.remove(value)
    for value in parameters:
        if value.uses():  # the scale of a weight that was stored earlier may have none left
            _bind(graph, value, tensors[value.name or ""].detach(), tensors)
    _share_quantized_inputs(graph)


def _bind(graph: ir.Graph, value: ir.Value, tensor: Tensor, tensors: dict[str, Tensor]) -> None:
    name = value.name or ""
    assert value.dtype is not None
    dtype = ir.tensor_adapters.to_torch_dtype(value.dtype)
    user = next(iter(value.uses())).node if len(value.uses()) == 1 else None
    if user is not None and user.op_type == "QuantizeLinear":
        _bind_quantized(graph, user, name, fp8_codes(tensor, tensors[user.inputs[1].name]))  # type: ignore[union-attr,index]
    elif user is not None and user.op_type == "Transpose":
        _replace(graph, [user], _initializer(graph, f"{name}.transposed", tensor.to(dtype).t().contiguous()))
    else:
        _replace_value(value, _initializer(graph, name, tensor.to(dtype)))


def _bind_quantized(graph: ir.Graph, quantize: ir.Node, name: str, codes: Tensor) -> None:
    """Weight -> QuantizeLinear -> DequantizeLinear -> Transpose becomes stored codes -> DequantizeLinear."""
    (dequantize,) = quantize.outputs[0].consumers()
    (transpose,) = dequantize.outputs[0].consumers()
    assert (dequantize.op_type, transpose.op_type) == ("DequantizeLinear", "Transpose")
    stored = _initializer(graph, f"{name}.fp8.transposed", codes.t().contiguous())
    dequantize.replace_input_with(0, stored)
    graph.remove(quantize, safe=True)
    _replace_value(transpose.outputs[0], dequantize.outputs[0])
    graph.remove(transpose, safe=True)


def _share_quantized_inputs(graph: ir.Graph) -> None:
    shared: dict[tuple[ir.Value, float], ir.Value] = {}
    for quantize in list(graph):
        if quantize.op_type != "QuantizeLinear":
            continue
        x, scale = quantize.inputs[0], quantize.inputs[1]
        assert x is not None
        assert scale is not None
        assert scale.const_value is not None
        (dequantize,) = quantize.outputs[0].consumers()
        first = shared.setdefault((x, float(scale.const_value.numpy())), dequantize.outputs[0])
        if first is not dequantize.outputs[0]:
            _replace_value(dequantize.outputs[0], first)
            graph.remove([dequantize, quantize], safe=True)
            del graph.initializers[scale.name or ""]


def _initializer(graph: ir.Graph, name: str, tensor: Tensor) -> ir.Value:
    stored = TorchTensor(tensor, name=name)
    value = ir.Value(name=name, type=ir.TensorType(stored.dtype), shape=stored.shape, const_value=stored)
    graph.initializers[name] = value
    return value


def _replace(graph: ir.Graph, nodes: list[ir.Node], by: ir.Value) -> None:
    _replace_value(nodes[-1].outputs[0], by)
    graph.remove(nodes, safe=True)


def _replace_value(value: ir.Value, by: ir.Value) -> None:
    for node, index in tuple(value.uses()):
        node.replace_input_with(index, by)
