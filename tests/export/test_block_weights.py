import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny_models import left_padded_prompts, tiny_model

from export.block_weights import Blocks, block_weights, round_to_nearest
from export.merge_products import merge_products
from export.runtime import OnnxSession
from export.to_onnx import export_onnx


def weight(rows=64, columns=12, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def values(blocks):
    zero_points = 0 if blocks.zero_points_BN is None else np.repeat(blocks.zero_points_BN, blocks.block_size, axis=0)
    codes = blocks.codes_KN.astype(np.float32) - zero_points
    return codes * np.repeat(blocks.scales_BN, blocks.block_size, axis=0)


def test_eight_bits_round_every_weight_to_half_a_step_but_the_ones_beyond_the_largest_code():
    matrix = weight()
    blocks = round_to_nearest(matrix, bits=8, block_size=32)
    assert (blocks.codes_KN.shape, blocks.scales_BN.shape, blocks.block_size) == ((64, 12), (2, 12), 32)
    assert (blocks.codes_KN == -128).any(axis=0).all()  # the largest magnitude of each block
    steps = np.abs(np.repeat(blocks.scales_BN, 32, axis=0))
    clipped = blocks.codes_KN == 127
    assert (np.abs(values(blocks) - matrix) <= steps * np.where(clipped, 1.001, 0.501)).all()


def test_four_bit_scales_have_the_least_error_of_those_tried():
    matrix = weight()
    error = np.square(values(round_to_nearest(matrix, bits=4, block_size=32)) - matrix).sum()
    blocks = matrix.reshape(2, 32, 12)
    scale = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1) / -8
    plain = np.clip(np.rint(blocks / scale), -8, 7) * scale
    assert error < 0.97 * np.square(plain - blocks).sum()


def test_a_block_of_zeros_stays_zero():
    assert not values(round_to_nearest(np.zeros((32, 3), np.float32), bits=4, block_size=32)).any()


@pytest.mark.parametrize(("bits", "head_bits"), [(4, None), (8, None), (4, 8)])
def test_onnx_runtime_multiplies_the_codes_as_they_are(bits, head_bits, graphs, plain_model, tmp_path):
    model = ir.load(graphs["fp32"])
    names = block_weights(model, bits=bits, head_bits=head_bits)
    assert len(names) == 3 * 7 + 1
    merge_products(model)
    path = tmp_path / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert operators.count("MatMulNBits") == 3 * 4 + 1
    assert "MatMul" not in operators
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    shared = (head_bits or bits) == 8  # an embedding that is tied to an 8-bit head needs no other copy
    assert ("lm_head.weight" in stored) != shared

    prompts = left_padded_prompts()
    output = OnnxSession(path, threads=1, exact=True).run(prompts["prompt_ids"], prompts["prompt_mask"])
    expected = rounded(plain_model, bits, head_bits or bits, embedding=shared)
    with torch.no_grad():
        logits = expected(input_ids=prompts["prompt_ids"], attention_mask=prompts["prompt_mask"]).logits
    valid = prompts["prompt_mask"].bool()
    torch.testing.assert_close(output.logits[valid], logits[valid], rtol=1e-3, atol=2e-3)


def rounded(model, bits, head_bits, *, embedding):
    """A copy of a model with the values that the graph stores."""
    copy = tiny_model(tie_word_embeddings=False)
    copy.load_state_dict(model.state_dict())
    for name, linear in copy.named_modules():
        if isinstance(linear, torch.nn.Linear):
            number = head_bits if name == "lm_head" else bits
            blocks = round_to_nearest(linear.weight.detach().numpy().T, bits=number, block_size=32)
            linear.weight.data = torch.from_numpy(values(blocks).T.copy())
    if embedding:
        copy.model.embed_tokens.weight.data = copy.lm_head.weight.data.clone()
    return copy


def test_given_codes_are_stored_instead_of_rounded_ones(graphs, tmp_path):
    model = ir.load(graphs["fp32"])
    name = "model.layers.1.mlp.down_proj.weight.transposed"
    codes = np.random.default_rng(1).integers(-8, 8, (96, 64)).astype(np.int8)
    scales, zero_points = np.full((3, 64), 0.25, np.float32), np.ones((3, 64), np.int8)
    block_weights(model, given={name: Blocks(codes, scales, 4, zero_points)})
    stored = model.graph.initializers
    assert np.array_equal(stored[f"{name}.int4"].const_value.numpy().astype(np.int8), codes)
    assert np.array_equal(stored[f"{name}.scale"].const_value.numpy(), scales)
    assert np.array_equal(stored[f"{name}.zero_point"].const_value.numpy().astype(np.int8), zero_points)
    assert name not in stored


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "expected 4 or 8 bits, found 3"),
        ({"head_bits": 16}, "expected 4 or 8 bits, found 16"),
        ({"block_size": 64}, "divides the 96 features"),
        ({"block_size": 24}, "power of two"),
        ({"given": {"nothing": Blocks(np.zeros((32, 1), np.int8), np.ones((1, 1), np.float32), 4)}}, "found 'nothing'"),
    ],
)
def test_impossible_settings_are_refused(settings, message, graphs):
    with pytest.raises(ValueError, match=message):
        block_weights(ir.load(graphs["fp32"]), **settings)


def test_an_untied_head_gets_its_own_codes(tmp_path):
    export_onnx(tiny_model(tie_word_embeddings=False), tmp_path / "model.onnx", precision="fp32")
    model = ir.load(tmp_path / "model.onnx")
    block_weights(model, bits=8)
    assert "model.embed_tokens.weight" in model.graph.initializers
    assert model.graph.initializers["lm_head.weight.transposed.int8"].shape == (64, 128)
