"""A head in blocks: how it is rounded, and that the runtime multiplies the codes as they are."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny_models import left_padded_prompts, tiny_model

from export.head_blocks import round_to_nearest, store_head
from export.runtime import OnnxSession
from export.to_onnx import export_onnx


def weight(rows=64, columns=12, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def values(codes, scales):
    return codes.astype(np.float32) * np.repeat(scales, len(codes) // len(scales), axis=0)


def test_eight_bits_round_every_weight_to_half_a_step_but_the_ones_beyond_the_largest_code():
    matrix = weight()
    codes, scales = round_to_nearest(matrix, bits=8, block_size=32)
    assert (codes.shape, scales.shape) == ((64, 12), (2, 12))
    assert (codes == -128).any(axis=0).all()  # the largest magnitude of each block
    steps = np.abs(np.repeat(scales, 32, axis=0))
    clipped = codes == 127
    assert (np.abs(values(codes, scales) - matrix) <= steps * np.where(clipped, 1.001, 0.501)).all()


def test_four_bit_scales_have_the_least_error_of_those_tried():
    matrix = weight()
    error = np.square(values(*round_to_nearest(matrix, bits=4, block_size=32)) - matrix).sum()
    blocks = matrix.reshape(2, 32, 12)
    scale = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1) / -8
    plain = np.clip(np.rint(blocks / scale), -8, 7) * scale
    assert error < 0.97 * np.square(plain - blocks).sum()


def test_a_block_of_zeros_stays_zero():
    assert not values(*round_to_nearest(np.zeros((32, 3), np.float32), bits=4, block_size=32)).any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtime_multiplies_the_codes_as_they_are(bits, tied, tmp_path):
    plain = tiny_model(layers=1, tie_word_embeddings=tied)
    export_onnx(plain, tmp_path / "plain.onnx", precision="fp32")
    model, path = ir.load(tmp_path / "plain.onnx"), tmp_path / "model.onnx"
    assert store_head(model, bits)
    ir.save(model, path, external_data="model.onnx.data")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert operators.count("MatMulNBits") == 1
    shared = tied and bits == 8  # an embedding that is tied to an 8-bit head needs no other copy
    names = [tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer]
    plain_embedding = "lm_head.weight" if tied else "model.embed_tokens.weight"
    assert (plain_embedding in names) != shared

    prompts = left_padded_prompts()
    output = OnnxSession(path, threads=1, exact=True).run(prompts["prompt_ids"], prompts["prompt_mask"])
    with torch.no_grad():
        expected = with_rounded_head(plain, bits, embedding=shared)
        logits = expected(input_ids=prompts["prompt_ids"], attention_mask=prompts["prompt_mask"]).logits
    valid = prompts["prompt_mask"].bool()
    torch.testing.assert_close(output.logits[valid], logits[valid], rtol=1e-3, atol=2e-3)


def with_rounded_head(model, bits, *, embedding):
    """A copy of a model with the values that the graph stores."""
    copy = tiny_model(layers=1, tie_word_embeddings=False)
    copy.load_state_dict(model.state_dict())
    blocks = round_to_nearest(copy.lm_head.weight.detach().numpy().T, bits=bits, block_size=64)
    copy.lm_head.weight.data = torch.from_numpy(values(*blocks).T.copy())
    if embedding:
        copy.model.embed_tokens.weight.data = copy.lm_head.weight.data.clone()
    return copy


@pytest.mark.parametrize(
    "model",
    [tiny_model("gemma2", layers=1, final_logit_softcapping=8.0), tiny_model(layers=1, hidden_size=72)],
    ids=["soft cap", "odd size"],
)
def test_another_head_stays_as_it_is(model, tmp_path):
    export_onnx(model, tmp_path / "model.onnx", precision="fp32")
    graph = ir.load(tmp_path / "model.onnx")
    assert not store_head(graph, 8)
    assert "DequantizeLinear" not in {node.op_type for node in graph.graph}
