"""The graph that returns log-probabilities of labels: the same numbers as the whole logits give, and a scorer on it."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.verification.faults import PLANTED
from datamodules.label_prompts import label_token_ids
from export.__main__ import main
from export.engine.to_tensorrt import build_engine
from export.folders.student import save_student
from export.onnx_graph.labels import LOG_PROBS, write_labels
from export.onnx_graph.prefill import write_beside
from export.onnx_graph.to_onnx import export_onnx
from export.serving.scorer import Scorer
from export.serving.triton import write_triton
from export.sessions.engine_session import EngineSession
from export.sessions.onnx_session import OnnxSession
from export.verify.exactness import FedSession, compare_graph
from export.verify.torch_run import Run
from tests.helpers.chat_doubles import byte_tokenizer
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
PROMPTS = left_padded_prompts()
TOKENS = {"yes": 90, "no": 7, "maybe": 8}
LABELS = ("n", "y")


def log_probs_of(session: OnnxSession, *arguments: object) -> torch.Tensor:
    return session.run(*arguments).logits[:, -1].float().log_softmax(-1)[:, list(TOKENS.values())]


@pytest.fixture(params=["fp32", "fp16", "fp8", "fp8-half", "int8", "int4_g32_zp"])
def graph(request: pytest.FixtureRequest, graphs: dict[str, Path], tmp_path: Path) -> Path:
    """A graph of each kind, in a folder of its own."""
    if request.param in graphs:
        shutil.copytree(graphs[request.param].parent, tmp_path / "onnx")
    else:
        export_onnx(
            quantized(tiny_model(), format=request.param), tmp_path / "onnx/model.onnx", precision=request.param
        )
    return tmp_path / "onnx/model.onnx"


def test_log_probabilities_of_the_same_weights(graph: Path) -> None:
    whole = OnnxSession(graph)
    path = write_labels(graph, TOKENS)
    assert path.name == "labels.onnx" and path.stat().st_size < 1_000_000
    some = OnnxSession(path)
    assert some.labels == TOKENS and not whole.labels
    ids_BT, mask_BT = PROMPTS["prompt_ids"], PROMPTS["prompt_mask"]
    output = some.run(ids_BT, mask_BT)
    assert output.others[LOG_PROBS].shape == (3, 3) and output.others[LOG_PROBS].dtype == torch.float32
    assert output.logits.numel() == 0
    tolerance = {"atol": 1e-2 if whole.run(ids_BT, mask_BT).logits.dtype == torch.float16 else 1e-4, "rtol": 0}
    torch.testing.assert_close(output.others[LOG_PROBS], log_probs_of(whole, ids_BT, mask_BT), **tolerance)

    cache = whole.run(ids_BT[:, :5], mask_BT[:, :5]).cache  # and behind a shared beginning
    rest = some.run(ids_BT[:, 5:], mask_BT, cache)
    torch.testing.assert_close(rest.others[LOG_PROBS], log_probs_of(whole, ids_BT, mask_BT), **tolerance)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return tiny_model(vocab_size=len(tokenizer) + 4)


@pytest.fixture(scope="module")
def folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An export of the command line."""
    root = tmp_path_factory.mktemp("labels")
    save_student(model, tokenizer, root / "model")
    words = [str(root / "model"), "--output", str(root / "out"), "--engine", "none", "--labels", *LABELS]
    assert main([*words, "--decode-steps", "1", "--prompts", "2", "--benchmark-repetitions", "0"]) == 0
    return root / "out"


def test_the_command_writes_verifies_and_reports_it(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    [row] = [row for row in report["artefacts"] if row["path"] == "onnx/labels.onnx"]
    assert "log-probabilities of n, y" in row["kind"]
    [check] = [check for check in report["verification"] if check["name"] == "onnx fp32, label graph"]
    assert check["status"] == "passed" and check["rounding_ratio"] < check["bound"] == 4


@pytest.mark.parametrize("labels", [LABELS, ("y", "n")])
def test_a_scorer_on_it_gives_the_same_scores(
    labels: tuple[str, ...], folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    candidates = ["Heat", "A much longer title (1999)", "Up", "Heat"]
    scores = [
        Scorer(OnnxSession(folder / f"onnx/{name}.onnx"), tokenizer, labels).score("Member 7", candidates)
        for name in ("model", "labels")
    ]
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=0)
    assert scores[0].std() > 0.01 and (scores[0][:, 0] - scores[0][:, 1]).abs().min() > 1e-4


def test_a_scorer_refuses_a_graph_for_other_labels(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    session = OnnxSession(folder / "onnx/labels.onnx")
    with pytest.raises(ValueError, match=r"expected a graph for the labels \['n', 'x'\], found one for \['n', 'y'\]"):
        Scorer(session, tokenizer, ("n", "x"))


def test_labels_that_are_no_tokens_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder.parent / "model"), "--output", str(tmp_path / "out"), "--engine", "none", "--labels"]
    assert main([*words, "n", "yes"]) == 2
    assert "expected every label as one token" in capsys.readouterr().err
    assert main([*words, "n"]) == 2
    assert "expected at least two different labels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def engine_folder(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a quantized model with engines."""
    root = tmp_path_factory.mktemp("label_engine")
    save_student(quantized(tiny_model(layers=1, vocab_size=len(tokenizer) + 4)), tokenizer, root / "model")
    words = [str(root / "model"), "--output", str(root / "out"), "--precision", "fp8", "--engine", "tensorrt_rtx"]
    words += ["--labels", *LABELS, "--sequence", "1", "16", "256", "--past", "0", "16", "256"]
    assert main([*words, "--decode-steps", "1", "--prompts", "2", "--benchmark-repetitions", "0"]) == 0
    return root / "out"


def test_a_label_that_is_looked_up_at_another_token_is_found(
    graphs: dict[str, Path], plain_model: PreTrainedModel, tmp_path: Path
) -> None:
    """Even where both tokens are equally probable."""
    shutil.copytree(graphs["fp16"].parent, tmp_path / "onnx")
    right = write_labels(tmp_path / "onnx/model.onnx", TOKENS)
    wrong = write_beside(right, "wrong.onnx", PLANTED["another label's token"][0])
    run = Run(plain_model, PROMPTS["prompt_ids"], PROMPTS["prompt_mask"])
    (passed,), (failed,) = (compare_graph("labels", [run], FedSession(path)) for path in (right, wrong))
    assert passed.status == "passed"
    assert failed.status == "failed" and "labels of the tokens [91, 7, 8]" in failed.reason


@needs_rtx
def test_an_engine_is_compiled_from_it(engine_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    report = json.loads((engine_folder / "report.json").read_text())
    paths = [row["path"] for row in report["artefacts"]]
    assert {"onnx/engine-source-labels.onnx", "engine/labels-tensorrt_rtx-portable.engine"} <= set(paths)
    assert report["label_engine"]["products"] == report["engine"]["products"] == {"FP8 x FP8": 7, "HALF x HALF": 1}
    statuses = {check["name"]: check["status"] for check in report["verification"]}
    assert statuses["engine fp8, labels, quantized products in the parsed network"] == "passed"
    assert statuses["onnx fp8 (float16 between), label graph"] == statuses["onnx fp8, label graph"] == "passed"
    if not torch.cuda.is_available():
        assert statuses["engine fp8, labels"] == "not_run"
    written = (engine_folder / "engine/labels-tensorrt_rtx-portable.engine").read_bytes()
    tokens = dict(zip(LABELS, label_token_ids(tokenizer, LABELS), strict=True))
    assert json.dumps({"precision": "fp8", "labels": json.dumps(tokens)}).encode() in written


@needs_rtx
def test_labels_that_an_engine_can_not_keep_are_refused(graphs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(graphs["fp16"].parent, tmp_path / "onnx")
    path = write_labels(
        tmp_path / "onnx/model.onnx", {f"a label with a long name, number {number}": 7 for number in range(100)}
    )
    with pytest.raises(
        ValueError, match="expected labels whose texts and tokens fit into an engine's name of 4095 characters, found"
    ):
        build_engine(path, tmp_path / "labels.engine", flavour="tensorrt_rtx")
    assert not (tmp_path / "labels.engine").exists()


@needs_rtx
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_scorer_on_the_engine(engine_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    sessions = [
        EngineSession(engine_folder / "engine/labels-tensorrt_rtx-portable.engine", "tensorrt_rtx"),
        OnnxSession(engine_folder / "onnx/engine-source-labels.onnx", exact=True),
    ]
    ours, theirs = (Scorer(session, tokenizer, LABELS).score("Member 7", ["Heat", "Up"]) for session in sessions)
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)


@needs_rtx
def test_the_engine_is_a_model_of_triton(engine_folder: Path, tmp_path: Path) -> None:
    """As far as a machine without a GPU can show: the file is named as if `tensorrt` had built it."""
    pytest.importorskip("tritonclient.grpc")
    shutil.copytree(engine_folder / "onnx", tmp_path / "onnx")
    (tmp_path / "engine").mkdir()
    for name in ("model", "labels"):
        engine = engine_folder / f"engine/{name}-tensorrt_rtx-portable.engine"
        shutil.copyfile(engine, tmp_path / f"engine/{name}-tensorrt-9.0.engine")
    repository = write_triton(tmp_path, name="tiny")
    assert {path.name for path in repository.iterdir()} == {
        *("tiny_onnx", "tiny_labels", "tiny_engine", "tiny_labels_engine")
    }
    config = (repository / "tiny_labels_engine/config.pbtxt").read_text()
    assert 'name: "log_probs"' in config and 'backend: "tensorrt"' in config and 'name: "logits"' not in config
    assert (repository / "tiny_labels_engine/1/model.plan").stat().st_size > 0


def test_the_graph_is_a_model_of_triton(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("tritonclient.grpc")
    repository = write_triton(folder, name="tiny", output=tmp_path / "triton")
    assert {path.name for path in repository.iterdir()} == {"tiny_onnx", "tiny_labels"}
    config = (repository / "tiny_labels/config.pbtxt").read_text()
    assert 'name: "log_probs"' in config and "dims: 2" in config and 'name: "logits"' not in config
    session = onnxruntime.InferenceSession(
        str(repository / "tiny_labels/1/model.onnx"), providers=["CPUExecutionProvider"]
    )
    ids_BT, mask_BT = torch.arange(3, 11)[None], torch.ones(1, 8, dtype=torch.long)
    feeds = {"input_ids": ids_BT.numpy(), "attention_mask": mask_BT.numpy(), "position_ids": np.arange(8)[None]}
    past = [item for item in session.get_inputs() if item.name.startswith("past")]
    feeds |= {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in past}
    [log_probs_BC] = session.run([LOG_PROBS], feeds)
    logits_BTV = OnnxSession(folder / "onnx/model.onnx").run(ids_BT, mask_BT).logits
    expected = logits_BTV[:, -1].log_softmax(-1)[:, label_token_ids(tokenizer, LABELS)]
    torch.testing.assert_close(torch.from_numpy(log_probs_BC), expected, atol=1e-5, rtol=0)
