"""Right graphs pass far below the bound, and faults are found: those of `benchmarks/verification/faults.py`, in tiny models."""

import random
from pathlib import Path

import pytest
import torch

from benchmarks.verification.__main__ import Examined
from benchmarks.verification.faults import PLANTED
from benchmarks.verification.graphs import Right
from export.cpu_graph.to_cpu import write_cpu_graph
from export.onnx_graph.to_onnx import export_onnx
from export.verify import verify
from export.verify.exactness import LIMIT
from models.copies import with_rounded_weights
from tests.helpers.tiny_models import VOCAB, left_padded_prompts, quantized, tiny_model

NAMES = {"fp16": "fp16", "fp8": "fp8", "fp8 half": "fp8-half"}  # of graphs that other tests look at, too
FORMATS = ("int4_g64_zp", "int8")
PLACES = [(fault, graph) for fault, (_, where) in PLANTED.items() for graph in where if graph in (*NAMES, *FORMATS)]


@pytest.fixture(scope="module")
def rights(tmp_path_factory, graphs: dict[str, Path], plain_model, quantized_model) -> dict[str, Right]:
    """Right graphs by name."""
    models = {"fp16": plain_model, "fp8": with_rounded_weights(quantized_model)}
    found = {name: Right(name, models[name.split()[0]], graphs[other], "tiny") for name, other in NAMES.items()}
    for format in FORMATS:
        model = quantized(tiny_model(intermediate_size=128), format=format)
        path = tmp_path_factory.mktemp(format) / "model.onnx"
        export_onnx(model, path, precision=format)
        found[format] = Right(format, with_rounded_weights(model), path, "tiny")
    return found


@pytest.fixture(scope="module")
def examined(rights) -> dict[str, Examined]:
    """The same with texts to look for faults on."""
    prompts = left_padded_prompts()
    texts = prompts["prompt_ids"], prompts["prompt_mask"]
    return {name: Examined(right, texts, decode_steps=4) for name, right in rights.items()}


@pytest.mark.parametrize("name", [*NAMES, *FORMATS])
def test_right_graphs_stay_far_below_the_bound(name, rights):
    draw = random.Random(name)
    for rows in (1, 5):
        lengths = [draw.randint(3, 12) for _ in range(rows)]
        mask_BT = torch.tensor([[0] * (12 - length) + [1] * length for length in lengths])
        ids_BT = torch.randint(3, VOCAB, mask_BT.shape, generator=torch.Generator().manual_seed(rows)) * mask_BT
        checks = verify(rights[name].model, rights[name].path, ids_BT, mask_BT, decode_steps=4)
        assert len(checks) == (2 if rows == 1 else 3)
        for check in checks:
            assert check.status == "passed" and check.rounding_ratio < LIMIT / 2, check


@pytest.mark.parametrize(("fault", "name"), PLACES)
def test_a_planted_fault_is_found(fault, name, examined):
    row = examined[name].row(fault, PLANTED[fault][0])
    assert row["caught"], row


def test_a_graph_that_is_only_saved_anew_is_right(examined):
    row = examined["fp8 half"].row("nothing", lambda model: None)
    assert not row["caught"] and 0 < row["rounding_ratio"] < LIMIT / 2


def test_the_worst_place_is_named(examined):
    row = examined["fp8"].row("weight", PLANTED["a weight's scale off by 5 %"][0])
    assert row["worst"].startswith("model.layers.1.mlp.down_proj gives ")


def test_graphs_for_the_cpu(tmp_path):
    """Products that are joined, of whole numbers, and a head in blocks."""
    model = quantized(tiny_model(intermediate_size=128), format="int8")
    export_onnx(model, tmp_path / "model.onnx", precision="int8")
    prompts = left_padded_prompts()
    path = write_cpu_graph(tmp_path / "model.onnx")
    checks = verify(model, path, prompts["prompt_ids"], prompts["prompt_mask"], decode_steps=4, for_cpu=True)
    assert [check.status for check in checks] == ["passed"] * 3, checks
