"""Graphs that several tests look at, written once."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from export.onnx_graph.to_onnx import export_onnx
from tests.helpers.tiny_models import quantized, tiny_model


@pytest.fixture(scope="session")
def plain_model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="session")
def quantized_model() -> PreTrainedModel:
    return quantized(tiny_model())


@pytest.fixture(scope="session")
def graphs(tmp_path_factory, plain_model, quantized_model) -> dict[str, Path]:
    """One graph a precision, by name; fp8-half has float16 between the matrix products."""
    folder = tmp_path_factory.mktemp("graphs")
    paths = {name: folder / name / "model.onnx" for name in ("fp32", "fp16", "fp8", "fp8-half")}
    export_onnx(plain_model, paths["fp32"], precision="fp32")
    export_onnx(plain_model, paths["fp16"], precision="fp16")
    export_onnx(quantized_model, paths["fp8"], precision="fp8")
    export_onnx(quantized_model, paths["fp8-half"], precision="fp8", activations="float16")
    return paths
