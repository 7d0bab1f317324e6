import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny_models import left_padded_prompts

from export.integer_products import integer_products
from export.merge_products import merge_products
from export.runtime import OnnxSession


def one_product(weight_KN):
    """A graph of one product, `x` (rows, K) times a constant."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", len(weight_KN)]))
    tensor = ir.tensor(weight_KN, name="weight")
    weight = ir.Value(name="weight", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    product = ir.Node("", "MatMul", [x, weight])
    product.outputs[0].name = "y"
    product.outputs[0].type = x.type
    graph = ir.Graph([x], product.outputs, nodes=[product], initializers=[weight], opset_imports={"": 21}, name="one")
    return ir.Model(graph, ir_version=10)


def result(model, x):
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_product_is_that_of_rounded_rows_and_columns():
    x, weight = numbers(5, 64), numbers(64, 7, seed=1)
    x *= np.array([[1e-3], [1], [50], [0], [1]], np.float32)  # each row has a scale of its own; one is all zeros
    model = one_product(weight)
    assert integer_products(model) == ["weight"]
    rows = np.maximum(np.abs(x).max(1, keepdims=True), 1e-12) / 127
    columns = np.abs(weight).max(0) / 127
    expected = np.rint(x / rows) @ np.rint(weight / columns) * rows * columns
    np.testing.assert_allclose(result(model, x), expected, rtol=1e-4, atol=1e-4 * rows.max())


def test_a_second_term_leaves_only_the_rounding_of_the_weight():
    x, weight = numbers(32, 64), numbers(64, 48, seed=1)
    columns = np.abs(weight).max(0) / 127
    rounded = np.rint(weight / columns) * columns
    errors = []
    for terms in (1, 2):
        model = one_product(weight)
        integer_products(model, terms=terms)
        errors.append(np.abs(result(model, x) - x @ rounded).max())
    assert errors[1] < errors[0] / 100


@pytest.mark.parametrize(("terms", "bound"), [(1, 0.1), (2, 0.03)])
def test_a_whole_graph_stays_close_with_padding_and_cache(terms, bound, graphs, tmp_path):
    model = ir.load(graphs["fp32"])
    merge_products(model)
    changed = integer_products(model, terms=terms)
    assert len(changed) == 3 * 4 + 1
    operators = [node.op_type for node in model.graph]
    assert operators.count("MatMulInteger") == terms * (3 * 4 + 1)
    assert "MatMul" not in operators
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    prompts, next_token = left_padded_prompts(), torch.tensor([[5], [6], [7]])
    mask = torch.cat([prompts["prompt_mask"], torch.ones_like(next_token)], dim=1)
    logits = []
    for path in (graphs["fp32"], tmp_path / "model.onnx"):
        session = OnnxSession(path, threads=1)
        first = session.run(prompts["prompt_ids"], prompts["prompt_mask"])
        second = session.run(next_token, mask, first.cache)
        logits.append(torch.cat([first.logits[:, -1:], second.logits], dim=1))
    assert (logits[1] - logits[0]).norm() < bound * logits[0].norm()


def test_weights_can_stay_as_they_are(graphs):
    model = ir.load(graphs["fp32"])
    changed = integer_products(model, keep=lambda name: "down_proj" in name or name == "lm_head.weight")
    assert len(changed) == 3 * 6
    assert [node.op_type for node in model.graph].count("MatMul") == 3 + 1
