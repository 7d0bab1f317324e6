import json

import onnx
import pytest
import torch
from onnx import TensorProto

from export.onnx_graph.to_onnx import export_onnx
from export.onnx_graph.trace import DecoderWithCache
from export.sessions.onnx_session import OnnxSession
from export.verify import verify
from models.structure.edits import apply_edit
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model


def check_parity(model, path, decode_steps=32):
    prompts = left_padded_prompts()
    checks = verify(model, path, prompts["prompt_ids"], prompts["prompt_mask"], decode_steps=decode_steps)
    assert [check.status for check in checks] == ["passed"] * len(checks), [check.reason for check in checks]
    return checks


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_plain_graphs_follow_torch_with_left_padding_and_cache(name, plain_model, graphs):
    _, decode, _ = check_parity(plain_model, graphs[name])
    assert decode.greedy_agreement is not None
    assert decode.greedy_agreement > 0.95


@pytest.mark.parametrize("name", ["fp8", "fp8-half"])
def test_quantized_graphs_follow_torch_with_left_padding_and_cache(name, quantized_model, graphs):
    assert len(check_parity(quantized_model, graphs[name])) == 3


def test_quantized_weights_are_stored_as_fp8_right_before_dequantization(graphs):
    for name in ("fp8", "fp8-half"):
        graph = onnx.load(graphs[name]).graph
        stored = {tensor.name: tensor for tensor in graph.initializer}
        makers = {output: node for node in graph.node for output in node.output}
        products = [node for node in graph.node if node.op_type == "MatMul" and "layers" in node.output[0]]
        assert len(products) == 3 * 7
        for product in products:
            activation, weight = (makers[operand] for operand in product.input)
            assert activation.op_type == weight.op_type == "DequantizeLinear"
            assert makers[activation.input[0]].op_type == "QuantizeLinear"
            assert stored[weight.input[0]].data_type == TensorProto.FLOAT8E4M3FN
            expected = TensorProto.FLOAT if name == "fp8" else TensorProto.FLOAT16
            assert {stored[node.input[1]].data_type for node in (activation, weight)} == {expected}
        # query, key and value read one tensor with one scale, and so do gate and up: four quantizations a layer
        assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 3 * 4


def test_tied_embeddings_are_stored_once_and_fp8_shrinks_the_file(graphs):
    sizes = {name: path.with_name("model.onnx.data").stat().st_size for name, path in graphs.items()}
    embedding, projections = 128 * 64, 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert sizes["fp32"] == pytest.approx(4 * (embedding + projections), rel=0.02)
    assert sizes["fp16"] == pytest.approx(2 * (embedding + projections), rel=0.02)
    assert sizes["fp8"] == pytest.approx(4 * embedding + projections, rel=0.04)
    assert sizes["fp8-half"] == pytest.approx(2 * embedding + projections, rel=0.04)


def test_interface_and_metadata(graphs):
    model = onnx.load(graphs["fp8-half"], load_external_data=False)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert list(shapes)[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert shapes["past_key_values.2.value"] == ["batch", 2, "past_sequence", 16]
    assert shapes["present.2.value"] == ["batch", 2, "past_sequence + sequence", 16]
    assert shapes["logits"] == ["batch", "sequence", 128]
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert (metadata["producer"], metadata["precision"], metadata["opset"]) == ("potstill", "fp8", "23")
    assert len(json.loads(metadata["structure"])["layers (neurons, query heads, key/value groups)"]) == 3


def test_opset_21_has_standard_operators_only_and_the_model_is_left_alone(tmp_path):
    model = quantized(tiny_model(layers=2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, tmp_path / "model.onnx", precision="fp8", opset=21, activations="float16")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not operators & {"Attention", "RMSNormalization", "RotaryEmbedding"}
    check_parity(model, tmp_path / "model.onnx", decode_steps=4)


def test_layers_of_different_sizes(tmp_path):
    model = tiny_model(layers=4)
    for layer in (1, 2):
        apply_edit(model, {"op": "narrow_mlp", "layer": layer, "keep": list(range(0, 96, 3))})
        apply_edit(model, {"op": "narrow_kv_groups", "layer": layer, "keep": [1]})
    export_onnx(quantized(model), tmp_path / "model.onnx", precision="fp8")
    check_parity(model, tmp_path / "model.onnx", decode_steps=4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", {"tie_word_embeddings": False}),
        ("mistral", {"sliding_window": 5}),
    ],
)
def test_other_families_with_biases_head_norms_and_sliding_windows(family, settings, tmp_path):
    model = tiny_model(family, layers=2, **settings)
    export_onnx(model, tmp_path / "model.onnx", precision="fp32")
    check_parity(model, tmp_path / "model.onnx", decode_steps=8)


def test_the_graph_of_repeated_layers_equals_the_traced_module(plain_model, graphs):
    """The unrolled graph computes what the wrapper computes, also at padding positions, which no model output reaches."""
    prompts = left_padded_prompts()
    ids, mask = prompts["prompt_ids"], prompts["prompt_mask"]
    empty = [torch.zeros(3, 2, 0, 16) for _ in range(6)]
    with torch.no_grad():
        logits, cache = DecoderWithCache(plain_model)(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), empty)
    output = OnnxSession(graphs["fp32"]).run(ids, mask)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(output.cache, cache, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours.numpy()), theirs, rtol=1e-4, atol=1e-5)


def test_precision_that_does_not_fit_the_model(plain_model, quantized_model, tmp_path):
    with pytest.raises(
        ValueError, match=r"frozen fp8 quantizers, found none; .*QuantizationAwareTraining.*--calibration"
    ):
        export_onnx(plain_model, tmp_path / "model.onnx", precision="fp8")
    with pytest.raises(
        ValueError, match=r"in the format int8 for precision int8, found fp8_e4m3; .*precision fp8_e4m3"
    ):
        export_onnx(quantized_model, tmp_path / "model.onnx", precision="int8")
    with pytest.raises(ValueError, match="without quantizers"):
        export_onnx(quantized_model, tmp_path / "model.onnx", precision="fp16")
    with pytest.raises(ValueError, match="opset among 21, 22, 23, found 9"):
        export_onnx(plain_model, tmp_path / "model.onnx", precision="fp32", opset=9)
    assert list(tmp_path.iterdir()) == []
