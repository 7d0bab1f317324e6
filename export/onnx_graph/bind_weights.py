"""Filling the weights into an unrolled graph, each in the form in which it is cheapest to store and to multiply.

- Weights of matrix products are stored transposed, so that the graph multiplies them as they lie.
- Fake-quantized weights are stored as FLOAT8E4M3FN, INT8 or INT4, directly followed by DequantizeLinear: one byte a weight or half of
  one, and the form that engines and runtimes turn into products of such numbers.
- A tensor with several uses (tied embeddings) is stored once.
- Projections that read the same tensor with the same scale (query, key and value; gate and up) share its quantization.
"""

import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from export.onnx_graph.trace import CODES
from models.quantization.linear import quantized_linears
from models.quantization.quantizers import WeightQuantizer

DATA_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values.")


def bind_weights(onnx_model: ir.Model, model: nn.Module) -> None:
    """Replace the parameter inputs of a graph, in place, by initializers with the values of a model under those names.

    The graph's floating point type decides that of weights and scales.
    """
    graph = onnx_model.graph
    parameters = [value for value in graph.inputs if not (value.name or "").startswith(DATA_INPUTS)]
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    quantizers = {f"{name}.weight": linear.weight_quantizer for name, linear in quantized_linears(model).items()}
    for value in parameters:
        graph.inputs.remove(value)
    for value in parameters:
        if value.uses():  # the scale of a weight that was stored earlier may have none left
            _bind(graph, value, tensors[value.name or ""].detach(), quantizers.get(value.name or ""))
    _share_quantized_inputs(graph)
    for name, value in list(graph.initializers.items()):
        if not value.uses():  # scales that are stored transposed, under another name
            del graph.initializers[name]


def _bind(graph: ir.Graph, value: ir.Value, tensor: Tensor, quantizer: WeightQuantizer | None) -> None:
    name = value.name or ""
    assert value.dtype is not None
    dtype = ir.tensor_adapters.to_torch_dtype(value.dtype)
    user = next(iter(value.uses())).node if len(value.uses()) == 1 else None
    if quantizer is not None and user is not None:
        _bind_quantized(graph, user, name, tensor, quantizer, dtype)
    elif user is not None and user.op_type == "Transpose":
        stored = _initializer(graph, f"{name}.transposed", tensor.to(dtype).t().contiguous())
        replace_all_uses_with(user.outputs[0], stored)
        graph.remove(user, safe=True)
    else:
        replace_all_uses_with(value, _initializer(graph, name, tensor.to(dtype)))


def _bind_quantized(
    graph: ir.Graph, quantize: ir.Node, name: str, weight_OI: Tensor, quantizer: WeightQuantizer, dtype: torch.dtype
) -> None:
    """Weight -> QuantizeLinear -> DequantizeLinear -> Transpose becomes stored codes -> DequantizeLinear, all transposed."""
    (dequantize,) = quantize.outputs[0].consumers()
    (transpose,) = dequantize.outputs[0].consumers()
    assert (dequantize.op_type, transpose.op_type) == ("DequantizeLinear", "Transpose")
    numbers, scales = quantizer.grid.numbers, quantizer.grid.scales
    codes = _codes(quantizer.codes(weight_OI).t().contiguous(), CODES[numbers])
    dequantize.replace_input_with(0, _initializer(graph, f"{name}.{numbers}.transposed", codes))
    if scales == "group":
        scale_value = _initializer(graph, f"{name}.scale.transposed", quantizer.scale.t().contiguous().to(dtype))
        dequantize.replace_input_with(1, scale_value)
    if scales != "tensor":
        dequantize.attributes["axis"] = ir.AttrInt64("axis", 0 if scales == "group" else 1)
    if quantizer.zero_point is not None:
        zero_points = _codes(quantizer.zero_point.t().contiguous(), CODES[numbers])
        dequantize.resize_inputs(3)
        dequantize.replace_input_with(2, _initializer(graph, f"{name}.zero_point.transposed", zero_points))
    graph.remove(quantize, safe=True)
    replace_all_uses_with(transpose.outputs[0], dequantize.outputs[0])
    graph.remove(transpose, safe=True)


def _codes(codes: Tensor, type: ir.DataType) -> ir.TensorProtocol:
    """Codes for storage: torch has no INT4."""
    return (
        ir.tensor(codes.cpu().numpy().astype(type.numpy()), dtype=type)
        if type == ir.DataType.INT4
        else TorchTensor(codes.cpu())
    )


def _share_quantized_inputs(graph: ir.Graph) -> None:
    shared: dict[tuple[ir.Value, float], ir.Value] = {}
    for quantize in list(graph):
        if quantize.op_type != "QuantizeLinear":
            continue
        x, scale = quantize.inputs[0], quantize.inputs[1]
        assert x is not None
        assert scale is not None
        if scale.const_value is None:  # found for each token: the same subgraph for all, and shared already
            continue
        if quantize.outputs[0].is_graph_output():  # codes of the cache
            continue
        (dequantize,) = quantize.outputs[0].consumers()
        first = shared.setdefault((x, float(scale.const_value.numpy())), dequantize.outputs[0])
        if first is not dequantize.outputs[0]:
            replace_all_uses_with(dequantize.outputs[0], first)
            graph.remove([dequantize, quantize], safe=True)
            del graph.initializers[scale.name or ""]


def _initializer(graph: ir.Graph, name: str, tensor: Tensor | ir.TensorProtocol) -> ir.Value:
    stored = TorchTensor(tensor.cpu()) if isinstance(tensor, Tensor) else tensor
    stored.name = name
    value = ir.Value(name=name, type=ir.TensorType(stored.dtype), shape=stored.shape, const_value=stored)  # type: ignore[arg-type]
    graph.initializers[name] = value
    return value
