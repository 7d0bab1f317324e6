"""A head in blocks: how it is rounded, and that the runtime multiplies the codes as they are."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from export.cpu_graph.head_blocks import round_to_nearest, store_embedding, store_head
from export.onnx_graph.to_onnx import export_onnx
from export.sessions.onnx_session import OnnxSession
from tests.helpers.tiny_models import VOCAB, left_padded_prompts, tiny_model


def weight(rows=64, columns=12, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def values(codes, scales):
    return codes.astype(np.float32) * np.repeat(scales, len(codes) // len(scales), axis=0)


def test_every_weight_moves_by_half_a_step_at_most_but_those_beyond_the_largest_code():
    matrix = weight()
    codes, scales = round_to_nearest(matrix, block_size=32)
    assert (codes.shape, scales.shape) == ((64, 12), (2, 12))
    assert (codes == -128).any(axis=0).all()  # the largest magnitude of each block
    steps = np.abs(np.repeat(scales, 32, axis=0))
    clipped = codes == 127
    assert (np.abs(values(codes, scales) - matrix) <= steps * np.where(clipped, 1.001, 0.501)).all()


def test_a_block_of_zeros_stays_zero():
    assert not values(*round_to_nearest(np.zeros((32, 3), np.float32), block_size=32)).any()


@pytest.mark.parametrize("tied", [True, False])
def test_onnx_runtime_multiplies_the_codes_as_they_are(tied, tmp_path):
    plain = tiny_model(layers=1, tie_word_embeddings=tied)
    export_onnx(plain, tmp_path / "plain.onnx", precision="fp32")
    model, path = ir.load(tmp_path / "plain.onnx"), tmp_path / "model.onnx"
    assert store_head(model)
    assert store_embedding(model) != tied  # one that is tied is stored already
    assert not store_head(model)
    assert not store_embedding(model)
    ir.save(model, path, external_data="model.onnx.data")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert operators.count("MatMulNBits") == 1
    stored = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert [stored[name] for name in stored if name.endswith(".int8")] == ([] if tied else [(64, VOCAB)]) + [
        (VOCAB, 64)
    ]
    assert not stored.keys() & {"lm_head.weight", "lm_head.weight.transposed", "model.embed_tokens.weight"}

    prompts = left_padded_prompts()
    output = OnnxSession(path, threads=1, exact=True).run(prompts["prompt_ids"], prompts["prompt_mask"])
    with torch.no_grad():
        expected = with_rounded_head(plain)
        logits = expected(input_ids=prompts["prompt_ids"], attention_mask=prompts["prompt_mask"]).logits
    valid = prompts["prompt_mask"].bool()
    torch.testing.assert_close(output.logits[valid], logits[valid], rtol=1e-3, atol=2e-3)


def with_rounded_head(model):
    """A copy of a model with the values that the graph stores."""
    copy = tiny_model(layers=1, tie_word_embeddings=False)
    copy.load_state_dict(model.state_dict())
    for module in (copy.lm_head, copy.model.embed_tokens):
        blocks = round_to_nearest(module.weight.detach().numpy().T, block_size=64)
        module.weight.data = torch.from_numpy(values(*blocks).T.copy())
    return copy


@pytest.mark.parametrize(
    "model",
    [tiny_model("gemma2", layers=1, final_logit_softcapping=8.0), tiny_model(layers=1, hidden_size=72)],
    ids=["soft cap", "odd size"],
)
def test_another_head_stays_as_it_is(model, tmp_path):
    export_onnx(model, tmp_path / "model.onnx", precision="fp32")
    graph = ir.load(tmp_path / "model.onnx")
    assert not store_head(graph)
    assert "DequantizeLinear" not in {node.op_type for node in graph.graph}
