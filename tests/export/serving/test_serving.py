"""The model repository: what Triton would read, and what a client would do with it."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import tritonclient.grpc
from google.protobuf import text_format
from transformers import AutoTokenizer
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import triton_to_np_dtype

from export.folders.student import save_student
from export.serving.__main__ import main
from export.serving.triton import write_triton
from export.sessions.onnx_session import OnnxSession
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny_models import tiny_model, tiny_tokenizer

HOWTO = (ROOT / "docs/howto-triton.md").read_text(encoding="utf-8")
TRITON_TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16"}
LEVELS = {  # as src/onnxruntime.cc of Triton's backend maps them
    0: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
}


def link_graph(graph: Path, folder: Path, name: str = "model.onnx") -> None:
    """Put a graph into an export folder; weights keep the name that the graph calls them by."""
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(graph, folder / "onnx" / name)
    if name == "model.onnx":
        shutil.copyfile(f"{graph}.data", folder / "onnx" / f"{name}.data")


@pytest.fixture
def exported(graphs, tmp_path, request):
    """An export folder with a graph of the precision in the parameter (fp32)."""
    folder = tmp_path / "exported"
    link_graph(graphs[getattr(request, "param", "fp32")], folder)
    return folder


def read_config(model: Path):
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def session_as_triton_makes_it(model: Path) -> onnxruntime.InferenceSession:
    config = read_config(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[config.optimization.graph.level]
    threads = config.parameters["intra_op_thread_count"].string_value
    options.intra_op_num_threads = int(threads or 0)
    path = model / "1" / config.default_model_filename
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("exported", ["fp32", "fp16", "fp8"], indirect=True)
def test_inputs_and_outputs_are_those_of_the_graph_and_it_computes_the_same(exported):
    model = write_triton(exported, name="tiny", threads=1) / "tiny_onnx"
    config = read_config(model)
    assert (config.name, config.backend, config.max_batch_size) == ("tiny_onnx", "onnxruntime", 16)
    assert config.HasField("dynamic_batching")
    session = session_as_triton_makes_it(model)
    for declared, actual in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [tensor.name for tensor in declared] == [tensor.name for tensor in actual]
        for tensor, expected in zip(declared, actual, strict=True):
            assert model_config_pb2.DataType.Name(tensor.data_type) == TRITON_TYPES[expected.type]
            assert expected.shape[0] == "batch"
            assert list(tensor.dims) == [size if isinstance(size, int) else -1 for size in expected.shape[1:]]

    ids_BT = torch.arange(3, 13).reshape(2, 5)
    feeds = {"input_ids": ids_BT.numpy(), "attention_mask": np.ones((2, 5), np.int64)}
    feeds["position_ids"] = np.tile(np.arange(5), (2, 1))
    dtype = np.float16 if "float16" in session.get_outputs()[0].type else np.float32
    feeds |= {item.name: np.zeros((2, item.shape[1], 0, item.shape[3]), dtype) for item in session.get_inputs()[3:]}
    expected = OnnxSession(exported / "onnx/model.onnx", threads=1).run(ids_BT, torch.ones_like(ids_BT)).logits
    np.testing.assert_array_equal(session.run(["logits"], feeds)[0], expected.numpy())


def test_an_engine_is_declared_by_the_graph_it_was_built_from(exported, graphs):
    link_graph(graphs["fp8-half"], exported, "engine-source.onnx")
    (exported / "engine").mkdir()
    (exported / "engine/model-tensorrt-portable.engine").write_bytes(b"plan")
    repository = write_triton(exported, name="tiny", max_batch_size=4)
    config = read_config(repository / "tiny_engine")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)
    assert (repository / "tiny_engine/1" / config.default_model_filename).read_bytes() == b"plan"
    types = {
        tensor.name: model_config_pb2.DataType.Name(tensor.data_type) for tensor in [*config.input, *config.output]
    }
    assert types["input_ids"] == "TYPE_INT64"
    assert types["past_key_values.2.value"] == types["logits"] == "TYPE_FP16"
    [group] = config.instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(group.profile) == ["0", "1"]

    (exported / "engine/model-tensorrt-8.9.engine").write_bytes(b"another")
    with pytest.raises(ValueError, match="expected one engine of tensorrt, found model-tensorrt-8.9.engine"):
        write_triton(exported, name="other")


def test_an_engine_that_triton_does_not_load_is_left_out_with_the_reason(exported, capsys):
    (exported / "engine").mkdir()
    (exported / "engine/model-tensorrt_rtx-8.9.engine").write_bytes(b"plan")
    assert main([str(exported)]) == 0
    printed = capsys.readouterr().out
    assert "engine/model-tensorrt_rtx-8.9.engine is left out: Triton's TensorRT backend loads engines of" in printed
    assert [path.name for path in (exported / "triton").iterdir()] == ["student_onnx"]

    (exported / "onnx/model.onnx").unlink()
    assert main([str(exported), "--name", "alone"]) == 2
    assert "found none; engine/model-tensorrt_rtx-8.9.engine is left out" in capsys.readouterr().err


def test_files_are_copies(exported):
    """onnx refuses external data with several hard links, also for whoever reads the export."""
    source = exported / "onnx/model.onnx.data"
    copied = write_triton(exported, name="copied") / "copied_onnx/1/model.onnx.data"
    assert copied.stat().st_nlink == source.stat().st_nlink == 1
    assert copied.read_bytes() == source.read_bytes()


def test_models_of_others_stay_and_ours_are_replaced_only_when_asked(exported, tmp_path, capsys):
    repository = tmp_path / "models"
    (repository / "theirs/1").mkdir(parents=True)
    arguments = [str(exported), "--output", str(repository)]
    assert main(arguments) == 0
    for file in ("1/model.plan", "notes.txt"):
        (repository / "student_onnx" / file).touch()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "expected no model 'student_onnx'" in message
    assert "--overwrite" in message
    assert (repository / "student_onnx/1/model.plan").exists()
    assert main([*arguments, "--overwrite"]) == 0
    assert not (repository / "student_onnx/1/model.plan").exists()
    assert (repository / "student_onnx/notes.txt").exists()
    assert sorted(path.name for path in repository.iterdir()) == ["student_onnx", "theirs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--name", "a/b"], "expected a name of letters, digits"),
        (["--max-batch-size", "0"], "expected --max-batch-size of at least 1, found 0"),
        (["--output", "unused"], "run `pip install -e .[serving]`"),
    ],
)
def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(change, message, exported, capsys, monkeypatch):
    monkeypatch.chdir(exported)
    if "serving" in message:
        monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    assert main([str(exported), *change]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in exported.iterdir()] == ["onnx"]


def test_a_folder_without_an_export_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "expected an export with onnx/model.onnx or an engine of tensorrt" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


class FakeServer:
    """What the how-to's client calls, answered by ONNX Runtime as Triton's backend would set it up."""

    def __init__(self, url: str) -> None:
        self.calls: list[dict[str, np.ndarray]] = []
        FakeServer.last = self

    def get_model_metadata(self, model: str):
        config = read_config(Path("exported/triton") / model)
        metadata = service_pb2.ModelMetadataResponse(name=model)
        for tensor in config.input:
            datatype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
            metadata.inputs.add(name=tensor.name, datatype=datatype, shape=[-1, *tensor.dims])
        return metadata

    def infer(self, model, inputs, outputs):
        feeds = {}
        for tensor in inputs:
            array = np.frombuffer(tensor._get_content(), triton_to_np_dtype(tensor.datatype()))
            feeds[tensor.name()] = array.reshape(tensor.shape())
        self.calls.append(feeds)
        names = [output.name() for output in outputs]
        results = session_as_triton_makes_it(Path("exported/triton") / model).run(names, feeds)
        return type("Result", (), {"as_numpy": lambda _, name: dict(zip(names, results, strict=True))[name]})()


def test_the_client_of_the_howto_gets_the_models_own_answer(exported, monkeypatch, capsys):
    student, tokenizer = tiny_model(), tiny_tokenizer()
    save_student(student, tokenizer, exported / "student")
    monkeypatch.chdir(exported.parent)
    [command] = re.findall(r"^python -m export\.serving (.+)$", HOWTO, re.MULTILINE)
    assert main(command.split()) == 0
    monkeypatch.setattr(tritonclient.grpc, "InferenceServerClient", FakeServer)
    [client] = re.findall(r"```python\n(.*?)```", HOWTO, re.DOTALL)
    capsys.readouterr()
    exec(compile(client, "howto-triton.md", "exec"), {})
    printed = capsys.readouterr().out

    served = AutoTokenizer.from_pretrained("exported/triton/student_onnx")
    messages = [{"role": "user", "content": "Capital of France?"}]
    text = served.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([served(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        generated = student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    answer = [token for token in generated[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id]
    assert len(answer) > 3
    assert printed == tokenizer.decode(answer) + "\n"
    calls = FakeServer.last.calls
    assert calls[0]["past_key_values.0.key"].shape == (1, 2, 0, 16)
    assert [call["input_ids"].shape[1] for call in calls[1:]] == [1] * (len(calls) - 1)
    assert calls[-1]["past_key_values.0.key"].shape[2] == ids.shape[1] + len(calls) - 2


@pytest.mark.parametrize(("content", "found"), [(b"", "an empty one"), (b"no graph", "what does not parse")])
def test_a_graph_that_is_none_is_refused(
    content: bytes, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").write_bytes(content)
    assert main([str(tmp_path), "--output", str(tmp_path / "served")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "expected an ONNX graph at" in line and found in line
    assert not (tmp_path / "served").exists()
