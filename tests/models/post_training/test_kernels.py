"""What fast kernels do to inputs, against ONNX Runtime itself."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from models.post_training.kernels import kernel_block, rounded_in_blocks
from models.quantization.formats import format_of


def product_in_onnx_runtime(
    input_TI: Tensor, codes_IO: Tensor, scale: Tensor, block_size: int, folder: Path
) -> tuple[Tensor, list[str]]:
    """What a session with default settings makes of a product, and its operators; scales (B, O) of 4-bit blocks or (O,) of 8-bit rows."""
    features, outputs = codes_IO.shape
    block = {"axis": 0, "block_size": block_size} if scale.dim() == 2 else {"axis": 1}
    numbers = TensorProto.INT4 if scale.dim() == 2 else TensorProto.INT8
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], **block),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", outputs])],
        [
            helper.make_tensor("codes", numbers, codes_IO.shape, codes_IO.flatten().tolist()),
            helper.make_tensor("scale", TensorProto.FLOAT, scale.shape, scale.flatten().tolist()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return torch.from_numpy(session.run(None, {"x": input_TI.numpy()})[0]), operators


@pytest.mark.parametrize(
    ("format", "features"),
    [("int4_g32", 96), ("int4_g64", 192), ("int4_g128", 256), ("int4_g128", 192), ("int8_weight_only", 96)],
)
def test_inputs_are_rounded_as_the_runtime_rounds_them(tmp_path, format, features):
    torch.manual_seed(0)
    grid = format_of(format).weight
    input_TI = torch.randn(5, features) * torch.logspace(-2, 2, features)
    codes_IO = torch.randint(int(grid.low), int(grid.high) + 1, (features, 32))
    groups = -(-features // grid.group_size) if grid.group_size else 1
    scale_BO = torch.rand(groups, 32) + 0.1
    weight_IO = codes_IO * scale_BO.repeat_interleave(grid.group_size or features, dim=0)[:features]
    scale = scale_BO if grid.group_size else scale_BO[0]
    found_TO, operators = product_in_onnx_runtime(input_TI, codes_IO, scale, grid.group_size, tmp_path)
    assert operators == ["MatMulNBits"]
    rounded_TO = rounded_in_blocks(input_TI[None], kernel_block(grid))[0] @ weight_IO
    exact_TO = input_TI @ weight_IO
    assert (found_TO - rounded_TO).abs().amax() < 0.01 * (found_TO - exact_TO).abs().amax()


def test_a_block_of_zeros_stays():
    assert torch.equal(rounded_in_blocks(torch.zeros(1, 3, 64), 32), torch.zeros(1, 3, 64))
