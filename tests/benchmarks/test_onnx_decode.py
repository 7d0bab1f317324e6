"""The benchmark's command on tiny graphs; those of onnxruntime-genai are stubbed, for its builder needs minutes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import onnx_decode, onnx_graphs
from benchmarks.onnx_graphs import GRAPHS, genai_graph, our_graph
from export.layout import CPU
from export.sessions.shared_cache import SharedCacheSession
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.long

PROMPT = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All graphs of a tiny model."""
    folder = tmp_path_factory.mktemp("graphs")
    batches = [{"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT), "labels": PROMPT}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graphs, "load_model", lambda reference: model())
        patch.setattr(onnx_graphs, "_calibration", lambda *_: batches)
        return {name: our_graph(name, folder / name) for name in GRAPHS}


def model():
    return tiny_model(hidden_size=64, intermediate_size=128, head_dim=16)


def test_graphs_stay_close_to_the_model_and_prefill_gives_the_last_logits(graphs: dict[str, Path]) -> None:
    with torch.no_grad():
        exact = model()(input_ids=PROMPT).logits
    for name, bound in (("fp32", 1e-4), ("int8", 0.06), ("int4", 0.5), ("prefill", 0.05)):
        path = graphs[name].with_name(CPU)
        logits = SharedCacheSession(path, length=20, threads=1).run(PROMPT)
        assert (logits - exact).norm() < bound * exact.norm()
    last = SharedCacheSession(graphs["prefill"], length=20, threads=1, piece=8).run(PROMPT, last_only=True)
    assert last.shape[:2] == (1, 1)
    assert (last - exact[:, -1:]).norm() < 0.05 * exact[:, -1:].norm()
    assert not list(graphs["prefill"].parent.glob("model.onnx*"))


def test_a_missing_peer_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graphs, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"expected the package `onnxruntime-genai`.*\[bench\]"):
        genai_graph("fp32", tmp_path, threads=1)
    assert not list(tmp_path.iterdir())


def test_the_divergence_is_that_of_two_distributions() -> None:
    exact, other = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    expected = 0.9 * torch.log(torch.tensor(1.8)) + 0.1 * torch.log(torch.tensor(0.2))
    assert onnx_decode._divergence(exact.log(), other.log()) == pytest.approx(float(expected), abs=1e-6)


def test_the_benchmark_writes_what_scripts_read(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def ours(name: str, folder: Path) -> Path:
        asked.append((name, folder.name))
        return graphs[name]

    def theirs(name: str, folder: Path, *, threads: int) -> Path:
        folder = graphs["fp32"].parent
        shutil.copy(graphs["fp32"], folder / "model.onnx")
        return folder

    def answers(*_: object) -> list[dict[str, torch.Tensor]]:
        labels = PROMPT.clone()
        labels[:, :5] = -100
        return [{"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT), "labels": labels}]

    def in_genai(folder: Path) -> onnx_decode.Run:
        return lambda: None  # at no cost, so that the ratios come from the other side

    for name, stub in {"our_graph": ours, "genai_graph": theirs, "answered": answers, "PACKAGES": ["torch"]}.items():
        monkeypatch.setattr(onnx_decode, name, stub)
    # In a process of its own nothing of this would hold.
    monkeypatch.setattr(onnx_decode, "_in_a_new_process", lambda rows, *arguments: rows(*arguments))
    monkeypatch.setattr(onnx_decode, "_decoding_in_genai", in_genai)
    monkeypatch.setattr(onnx_decode, "_prefilling_in_genai", in_genai)
    monkeypatch.setattr(onnx_decode, "load_model", lambda reference: model())
    for name in ("load_tokenizer", "held_out_prompts"):
        monkeypatch.setattr(onnx_decode, name, lambda *_: None)
    for name, value in {"PAST": 6, "NEW": 2, "PROMPT": 12, "HEAD_DIM": 16}.items():
        monkeypatch.setattr(onnx_decode, name, value)
    monkeypatch.setattr(onnx_decode, "_prompt", lambda length: list(range(3, 3 + length)))
    target = tmp_path / "out.json"
    options = ["--repetitions", "2", "--threads", "1", "--folder", str(tmp_path / "kept"), "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["onnx_decode", *options])
    onnx_decode.main()
    assert [name for name, _ in asked] == ["fp32", "int8", "int4", "prefill"]
    written = json.loads(target.read_text())
    assert set(written["ratios"]) == {"decode_fp32", "decode_int8", "decode_int4", "ttft_512"}
    rows = written["results"]
    assert [row["what"] for row in rows].count("decode") == 3 * 3
    assert [row["what"] for row in rows].count("first token") == 1 + 2 * 4
    decode = {row["name"]: row for row in rows if row["what"] == "decode" and row["precision"] == "fp32"}
    best = max(row["tokens_per_second"] for name, row in decode.items() if name != "ours")
    assert written["ratios"]["decode_fp32"] == pytest.approx(decode["ours"]["tokens_per_second"] / best)
    divergence = {row["name"]: row["kl"] for row in rows if row["what"] == "fidelity"}
    assert abs(divergence["ours fp32"]) < 1e-6
    assert 0 < divergence["ours int8"] < 0.1
    assert {row["tokens"] for row in rows if row["what"] == "fidelity"} == {15}
