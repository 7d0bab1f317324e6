"""One numerics: the fake quantizer in torch and Q/DQ in ONNX Runtime give the same bits in float32."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from models.quantization import Grid, fake_quantize

E4M3_MAX = Grid("fp8_e4m3").high


def onnx_quantize_dequantize(x: np.ndarray, scale: float) -> np.ndarray:
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]), zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def codes_and_ties(scale: float) -> torch.Tensor:
    """Every FP8 value, every midpoint between neighbours, and their float32 neighbours: where rounding is decided."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values * scale
    ties = (grid[1:] + grid[:-1]) / 2
    points = torch.cat([grid, ties])
    return torch.cat([points, points.nextafter(torch.tensor(torch.inf)), points.nextafter(torch.tensor(-torch.inf))])


@pytest.mark.parametrize("scale", [1.0, 2.0**-14, 0.0123, 3.7, 1e-3])
def test_same_bits_including_clipping_and_subnormals(scale: float):
    torch.manual_seed(0)
    magnitudes = 2.0 ** torch.randint(-14, 12, (20_000,)).float()
    x = torch.cat([torch.randn(20_000) * magnitudes * scale, codes_and_ties(scale)])
    ours = fake_quantize(x, torch.tensor(scale))
    theirs = torch.from_numpy(onnx_quantize_dequantize(x.numpy(), scale))
    assert (x.abs() > E4M3_MAX * scale).any()
    assert ((ours.abs() > 0) & (ours.abs() < 2.0**-6 * scale)).any()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_rounding_again_changes_nothing():
    x = torch.randn(10_000) * 30
    scale = torch.tensor(0.0371)
    once = fake_quantize(x, scale)
    assert torch.equal(fake_quantize(once, scale), once)
