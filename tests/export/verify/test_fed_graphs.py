"""Where graphs are fed: at every product and quantizer, in every form of graph, and nowhere else."""

import onnx
import pytest

from export.cpu_graph.to_cpu import write_cpu_graph
from export.onnx_graph.to_onnx import export_onnx
from export.verify.taps import FED, fed_graph
from tests.helpers.tiny_models import quantized, tiny_model

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
READERS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]  # the first ones of what they read


def written(folder, format=None, *, cpu=False, layers=2, **settings):
    model = tiny_model(layers=layers)
    model = model if format is None else quantized(model, format=format, **settings)
    export_onnx(model, folder / "model.onnx", precision=format or "fp32")
    return write_cpu_graph(folder / "model.onnx") if cpu else folder / "model.onnx"


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("format", [None, "fp8_e4m3", "int8", "int8_static", "int4_g32"])
def test_every_product_is_fed_and_returned(format, cpu, tmp_path):
    if cpu and format == "fp8_e4m3":
        pytest.skip("CPUs have no such graph")
    fed = fed_graph(written(tmp_path, format, cpu=cpu))
    expected = [f"model.layers.{layer}.{name}" for layer in range(2) for name in READERS]
    assert [entrance.module for entrance in fed.entrances] == [*expected, "lm_head"]
    given = [module for product in fed.products for module in product.modules]
    assert len(fed.products) >= 2 * 4 + 1 and {*(f"model.layers.1.{name}" for name in QKV), "lm_head"} <= set(given)
    inputs = {value.name for value in fed.model.graph.input}
    outputs = {value.name for value in fed.model.graph.output}
    assert {entrance.value + FED for entrance in fed.entrances} <= inputs
    assert {entrance.value for entrance in fed.entrances} | {product.value for product in fed.products} <= outputs
    read = {name for node in fed.model.graph.node for name in node.input}
    assert read.isdisjoint(entrance.value for entrance in fed.entrances)  # everybody reads what is fed


def test_quantizers_of_the_cache_are_fed(tmp_path):
    fed = fed_graph(written(tmp_path, "int4_g32", kv_cache="int8"))
    found = [entrance.module for entrance in fed.entrances if "cache_quantizer" in entrance.module]
    assert found == [
        f"model.layers.{n}.self_attn.cache_quantizer.{kind}" for n in range(2) for kind in ("key", "value")
    ]


def test_a_layer_by_itself_needs_no_other(tmp_path):
    path = written(tmp_path, layers=3)
    fed = fed_graph(path, [1])
    assert {entrance.module.split(".")[2] for entrance in fed.entrances} == {"1"}
    weights = {tensor.name for tensor in fed.model.graph.initializer if ".weight" in tensor.name}
    assert weights and all(name.startswith("model.layers.1.") for name in weights)
    # What the layer would read from the layers before it is not compared.
    compared = {entrance.module for entrance in fed.entrances if entrance.value in fed.compared}
    assert compared == {"model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"}
    assert len(fed.model.graph.node) < len(onnx.load(path, load_external_data=False).graph.node) / 2
