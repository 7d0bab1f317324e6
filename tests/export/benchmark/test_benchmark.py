"""Export folders side by side: what is measured, what is left out, and what the energy counters say."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from export.benchmark import energy as benchmark_energy
from export.benchmark.__main__ import main
from export.benchmark.artefacts import find_artefacts, open_session
from export.benchmark.energy import Counter, Meter, find_counters
from export.benchmark.measure import Cell, measure
from export.benchmark.turns import cells, compare
from export.benchmark.worker import Worker
from export.folders.student import save_student
from export.sessions.session import Output
from export.sessions.torch_session import TorchSession
from tests.helpers.tiny_models import tiny_model, tiny_tokenizer

QUICK = ["--prompts", "4", "6", "--batches", "1", "2", "--new-tokens", "2", "--repetitions", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def exported(graphs, plain_model, tmp_path_factory) -> Path:
    """A folder with student and graph; shared, so read only."""
    folder = tmp_path_factory.mktemp("root") / "exported"
    shutil.copytree(graphs["fp32"].parent, folder / "onnx")
    save_student(plain_model, tiny_tokenizer(), folder / "student")
    return folder


def test_the_command_measures_every_artefact_and_says_what_is_missing(exported, tmp_path, capsys):
    arguments = [str(exported), *QUICK, "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "b.json").read_text())
    assert [artefact["name"] for artefact in result["artefacts"]] == ["exported torch", "exported onnx"]
    assert result["artefacts"][1]["bytes"] == sum(path.stat().st_size for path in (exported / "onnx").iterdir())
    measured = [(row["name"], row["batch"], row["prompt_tokens"]) for row in result["rows"]]
    grid = [(1, 4), (1, 6), (2, 4)]
    assert measured == [(name, *cell) for name in ("exported torch", "exported onnx") for cell in grid]
    for row in result["rows"]:
        for figure in ("time_to_first_token_ms", "time_per_output_token_ms", "tokens_per_second"):
            assert 0 < row[f"{figure}_min"] <= row[figure] <= row[f"{figure}_max"]
        assert row["tokens_per_second_max"] == pytest.approx(1000 * row["batch"] / row["time_per_output_token_ms_min"])
        assert row["peak_bytes"] > 10_000_000
        assert row["device_bytes"] is None
    assert result["skipped"] == [
        {"name": "exported engine", "reason": "there is no engine/model-*.engine (the export left `engine` out)"}
    ]
    assert "not measured: exported engine: there is no engine/model-*.engine" in printed
    assert result["machine"]["cores"] > 0
    assert result["versions"]["torch"] == torch.__version__
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.png"]


class Recorded:
    """A session that remembers what it was given."""

    def __init__(self, session) -> None:
        self.session = session
        self.calls: list[tuple[object, tuple[int, ...]]] = []

    def run(self, ids, mask, cache=None):
        self.calls.append((ids.tolist(), tuple(mask.shape)))
        return self.session.run(ids, mask, cache)


def test_every_runtime_continues_alike(exported):
    """What is timed is the same greedy continuation of the same prompt."""
    artefacts, _ = find_artefacts([exported])
    told = {}
    for artefact in artefacts:
        session = Recorded(open_session(artefact, 1, 16))
        measure(session, Cell(2, 5, 3))
        told[artefact.runtime] = session.calls
    assert [shape for _, shape in told["torch"]] == [(2, 5), (2, 6), (2, 7), (2, 8)]
    assert told["torch"] == told["onnx"]


def test_torch_computes_the_last_position_only():
    output = TorchSession(tiny_model()).run(torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long))
    assert output.logits.shape[:2] == (2, 1)


def test_the_prompt_and_the_tokens_after_it_are_timed_apart(monkeypatch):
    now = iter([10.0, 13.0, 18.0])
    monkeypatch.setattr("export.benchmark.measure.time.perf_counter", lambda: next(now))

    class Constant:
        def run(self, ids, mask, cache=None):
            return Output(torch.zeros(1, 1, 3), [], {})

    assert measure(Constant(), Cell(1, 4, 2)) == (3.0, 5.0)


def test_the_grid_is_a_cross_and_not_a_product():
    assert cells([512, 128], [4, 1], 8) == [Cell(1, 128, 8), Cell(1, 512, 8), Cell(4, 128, 8)]


def test_artefacts_take_turns_after_a_warm_up_and_one_that_fails_keeps_its_reason(exported, monkeypatch):
    artefacts, _ = find_artefacts([exported])
    turns = []

    class FakeWorker:
        def __init__(self, artefact, threads, length):
            self.artefact = artefact

        def __enter__(self):
            return self

        def __exit__(self, *_):
            turns.append("closed")

        def measure(self, cell):
            turns.append((self.artefact.runtime, cell.batch))
            if self.artefact.runtime == "onnx" and cell.batch == 2:
                return {"error": "too large"}
            seconds = float(len(turns))
            return {
                "first_seconds": seconds,
                "decode_seconds": seconds,
                "peak_bytes": len(turns),
                "device_bytes": 7,
                "joules": 3.0,
            }

    monkeypatch.setattr("export.benchmark.turns.Worker", FakeWorker)
    steps = []
    rows = compare(artefacts, cells([4], [1, 2], 2), repetitions=2, on_step=lambda: steps.append(1))
    warm_up = [("torch", 1), ("torch", 2), ("onnx", 1), ("onnx", 2)]
    assert turns == [*warm_up, *[("torch", 1), ("onnx", 1), ("torch", 2)] * 2, "closed", "closed"]
    assert len(steps) == 2 * 2 * 3
    assert rows[3] == {"name": "exported onnx", "batch": 2, "prompt_tokens": 4, "reason": "too large"}
    assert rows[0]["time_to_first_token_ms"] == 1000 * (5 + 8) / 2
    assert rows[0]["time_per_output_token_ms_min"] == 1000 * 5 / 2
    assert rows[1]["tokens_per_second_max"] == 2 * 2 / 7
    assert rows[0]["peak_bytes"] == 8
    assert rows[1]["joules_per_1000_tokens"] == 1000 * 3 / (2 * 3)


def test_an_artefact_that_does_not_load_is_a_reason(exported, tmp_path):
    broken = tmp_path / "broken"
    (broken / "onnx").mkdir(parents=True)
    (broken / "onnx/model.onnx").write_bytes(b"no graph")
    [artefact], _ = find_artefacts([broken], ["onnx"])
    with Worker(artefact, 1, 16) as worker:
        answers = [worker.measure(Cell(1, 4, 2)) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0]["error"].startswith("the process ended with code 1 (")
    assert "Error" in answers[0]["error"]


def test_the_command_fails_where_an_artefact_was_not_measured_at_all(exported, tmp_path, capsys):
    broken = tmp_path / "broken"
    (broken / "onnx").mkdir(parents=True)
    (broken / "onnx/model.onnx").write_bytes(b"no graph")
    assert main([str(exported), str(broken), "--runtimes", "onnx", *QUICK]) == 2
    assert "the process ended with code 1" in capsys.readouterr().out


def test_the_memory_of_a_worker_is_its_own(exported):
    """Memory that the parent holds at the same time is in no figure of the child."""
    [artefact], _ = find_artefacts([exported], ["onnx"])
    with Worker(artefact, 1, 16) as worker:
        before = worker.measure(Cell(1, 4, 2))["peak_bytes"]
        held = bytearray(b"1") * 200_000_000
        after = worker.measure(Cell(1, 4, 2))["peak_bytes"]
    assert len(held) == 200_000_000
    assert abs(after - before) < 50_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "expected an export folder"),
        (["exported", "exported"], "expected every folder once, found 'exported' twice"),
        (
            ["exported", "--runtimes", "engine"],
            "expected at least one artefact that runs here, found none (exported engine: there is",
        ),
        (["exported", "--plot", "b.txt"], "expected a picture's name with .png or .pdf or .svg, found 'b.txt'"),
        (["exported", "--json", "no/such/b.json"], "expected a folder to write b.json into"),
    ],
)
def test_bad_folders_get_one_sentence(arguments, message, exported, capsys, monkeypatch):
    monkeypatch.chdir(exported.parent)
    assert main([*arguments, *QUICK]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_engine_is_left_out_with_the_reason_of_this_machine(exported, tmp_path, monkeypatch):
    folder = tmp_path / "exported"
    shutil.copytree(exported, folder)
    (folder / "engine").mkdir()
    for name in ("model-tensorrt-8.9", "model-tensorrt_rtx-8.9", "model-portable"):
        (folder / f"engine/{name}.engine").touch()
    asked = {"tensorrt": None, "tensorrt_rtx": "no GPU", "auto": "no package"}
    monkeypatch.setattr("export.sessions.engine_session.why_not_runnable", asked.get)
    artefacts, skipped = find_artefacts([folder], ["engine"])
    assert [(artefact.name, artefact.device) for artefact in artefacts] == [("exported tensorrt-8.9", "cuda")]
    assert skipped == [
        {"name": "exported portable", "reason": "no package"},
        {"name": "exported tensorrt_rtx-8.9", "reason": "no GPU"},
    ]


def test_folders_of_the_same_name_are_told_apart(exported, tmp_path):
    for run in ("a", "b"):
        shutil.copytree(exported, tmp_path / run / "exported")
    artefacts, _ = find_artefacts([tmp_path / "a/exported", tmp_path / "b/exported"], ["onnx"])
    assert [artefact.name for artefact in artefacts] == ["a/exported onnx", "b/exported onnx"]


def test_energy_is_what_the_packages_count_and_survives_a_wrap(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_energy, "_nvml", list)
    for domain, start in (("intel-rapl:0", 9_000_000), ("intel-rapl:0:0", 5), ("intel-rapl:1", 0)):
        (tmp_path / domain).mkdir()
        (tmp_path / domain / "energy_uj").write_text(f"{start}\n")
        (tmp_path / domain / "max_energy_range_uj").write_text("10000000\n")
    counters, reason = find_counters(tmp_path)
    assert reason is None
    assert [counter.name for counter in counters] == ["intel-rapl:0", "intel-rapl:1"]
    meter = Meter(counters)
    (tmp_path / "intel-rapl:0/energy_uj").write_text("2000000\n")
    (tmp_path / "intel-rapl:1/energy_uj").write_text("4000000\n")
    assert meter.joules() == pytest.approx(3 + 4)
    assert meter.joules() == 0


def test_without_counters_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_energy, "_nvml", list)
    counters, reason = find_counters(tmp_path)
    assert counters == []
    assert "this machine shows no counter" in reason
    assert Meter(counters).joules() is None

    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0/energy_uj").write_text("1")

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(benchmark_energy, "_rapl", refuse)
    assert "may not be read by this user" in find_counters(tmp_path)[1]


def test_a_counter_that_never_wraps_is_read_as_it_is():
    values = iter([1.0, 4.5])
    assert Meter([Counter("gpu", lambda: next(values))]).joules() == 3.5
