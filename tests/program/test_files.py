"""Whole or not at all: results under a kill at any line, a full disk, a second writer, and names of the wrong kind."""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import AtomicCheckpointIO
from export import pipeline
from export.__main__ import main
from export.benchmark import __main__ as benchmark
from export.layout import FILES, WRITTEN
from export.settings import ExportSettings
from export.verify import Verification
from export.verify.checks import Check
from program import files
from program.files import move_into_place, only_one, staging_folder, write_file
from tests.helpers.chat_doubles import byte_tokenizer
from tests.helpers.tiny import tiny_batch, tiny_folder, tiny_model


def child(work: Callable[[], None]) -> int:
    """Do the work in a child process; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # it must never go back into pytest
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(line: int, work: Callable[[], None]) -> Callable[[], None]:
    """The work, with a SIGKILL before the so-many-th line of the code that puts files in place."""
    watched = {"_move", "move_into_place", "_exchange", "_link", "write_file", "_new_staging"}

    def run() -> None:
        count = 0

        def trace(frame, event, _):
            nonlocal count
            if frame.f_code.co_name not in watched or frame.f_code.co_filename not in (
                files.__file__,
                pipeline.__file__,
            ):
                return None
            if event == "line":
                count += 1
                if count == line:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work()

    return run


def folder(path: Path, generation: str, **more: str) -> Path:
    """An export's files, all of one generation."""
    for name in ("student/config.json", "student/model.safetensors", "onnx/model.onnx", "onnx/model.onnx.data"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(generation)
    for name, text in more.items():
        (path / name.replace("__", "/").replace("_dot_", ".")).write_text(text)
    return path


def generations(output: Path) -> dict[str, set[str]]:
    """Which generation each of the export's folders is from."""
    return {
        name: {path.read_text() for path in (output / name).iterdir() if path.name not in ("notes.txt", "mine.bin")}
        for name in ("student", "onnx")
    }


@pytest.mark.parametrize("atomic", [True, False], ids=["one step", "two steps"])
def test_a_kill_at_any_line_of_the_exchange_loses_nothing(
    atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder is the old or the new one, never a mixture of both and never missing; somebody else's files stay."""
    if not atomic:  # as on file systems that cannot exchange names
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: None)

    line, kills, seen = 0, 0, set()
    while True:
        line += 1
        output = folder(tmp_path / str(line), "old", student__notes_dot_txt="mine", onnx__mine_dot_bin="mine")

        def export(output: Path = output) -> None:
            with only_one(output), staging_folder(output) as staging:
                pipeline._move(folder(staging, "new"), output)

        status = child(killed_at(line, export))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        if not atomic:
            with only_one(output):  # the next start finishes what two steps left in the middle
                pass
        found = generations(output)
        for of_folder in found.values():
            assert of_folder in ({"old"}, {"new"})
        seen.add(tuple(sorted(generation for of_folder in found.values() for generation in of_folder)))
        assert (output / "student/notes.txt").read_text() == (output / "onnx/mine.bin").read_text() == "mine"
        with only_one(output):
            pass
        assert sorted(os.listdir(output)) == ["onnx", "student"]  # what was left behind is swept
    assert generations(output) == {"student": {"new"}, "onnx": {"new"}}
    assert kills > 40
    assert ("old", "old") in seen and ("new", "new") in seen


def test_a_kill_at_any_line_of_writing_a_file_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.json"
    for line in range(1, 200):
        write_file(path, lambda path: path.write_text("old"))
        status = child(killed_at(line, lambda: write_file(path, lambda path: path.write_text("new"))))
        assert path.read_text() in ("old", "new")
        if status == 0:
            break
    assert status == 0 and line > 10
    write_file(path, lambda path: path.write_text("again"))
    assert os.listdir(path.parent) == ["results.json"]


def test_a_checkpoint_that_was_being_written_is_swept_when_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    content: dict[str, Any] = {"edits": [], "hyper_parameters": {}, "state_dict": {}}
    AtomicCheckpointIO().save_checkpoint(content, path)

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die() -> None:
        torch.save = die  # type: ignore[assignment]
        AtomicCheckpointIO().save_checkpoint(content, path)

    assert child(save_and_die) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    AtomicCheckpointIO().load_checkpoint(path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_what_a_living_process_writes_is_not_swept(tmp_path: Path) -> None:
    with staging_folder(tmp_path) as staging:
        (staging / "half").touch()
        assert child(lambda: files.sweep(tmp_path)) == 0
        assert (staging / "half").exists()


def test_a_file_never_replaces_a_folder_nor_the_reverse(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/last.ckpt").touch()
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"expected a file or nothing at '.*runs', found a folder; choose another name"
    ):
        write_file(tmp_path / "runs", lambda path: path.write_text("{}"))
    with staging_folder(tmp_path) as staging:
        (staging / "new").mkdir()
        with pytest.raises(ValueError, match="expected a folder or nothing at '.*file', found a file"):
            move_into_place(staging / "new", tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "last.ckpt", "runs"]


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_the_benchmark_does_not_delete_the_folder_of_all_runs(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs.png"
    runs.mkdir()
    (runs / "last.ckpt").touch()
    monkeypatch.setattr(benchmark, "_benchmark", lambda options: pytest.fail("refused before it measures"))
    assert benchmark.main(["exported", option, str(runs)]) == 2
    assert "expected a file or nothing at" in capsys.readouterr().err
    assert (runs / "last.ckpt").exists()


def test_two_exports_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    ready, go = os.pipe(), os.pipe()

    def first() -> None:
        with only_one(out):
            os.write(ready[1], b".")
            os.read(go[0], 1)

    pid = os.fork()
    if pid == 0:
        first()
        os._exit(0)
    os.read(ready[0], 1)
    student = tiny_folder(tmp_path / "student")
    capsys.readouterr()
    try:
        assert main([student, "--output", str(out), "--engine", "none"]) == 2
    finally:
        os.write(go[1], b".")
        os.waitpid(pid, 0)
    message = capsys.readouterr().err
    assert message.startswith("error: expected to be alone in") and "another process" in message
    assert not out.exists()  # it was new, and nothing was written
    with only_one(out), only_one(out):
        pass


def test_a_full_disk_is_one_sentence_and_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def fill(temporary: Path) -> None:
        with open("/dev/full", "wb") as file:
            torch.save({"step": 2, "weights": torch.zeros(100_000)}, file)

    with pytest.raises(ValueError, match=r"expected room on the disk of .*, found it full; .*start again") as error:
        write_file(path, fill)
    assert "\n" not in str(error.value)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]

    def fill_in_rust(_: Path) -> None:
        raise RuntimeError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

    with pytest.raises(ValueError, match="expected room on the disk"):
        write_file(path, fill_in_rust)
    with pytest.raises(RuntimeError, match="another"):
        write_file(path, lambda _: (_ for _ in ()).throw(RuntimeError("another")))


# Exports ------------------------------------------------------------------------------------------------------------

SHORT = ["--engine", "none", "--benchmark-repetitions", "0", "--decode-steps", "1", "--prompts", "1"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """Exports whose graph is a name only, and what their verification finds."""
    found: list[Check] = []

    def write_graphs(model, graphs, staging, phases):
        (staging / "onnx").mkdir()
        (staging / "onnx/model.onnx").write_text(str(float(model.model.norm.weight[0])))

    monkeypatch.setattr(pipeline, "_write_graphs", write_graphs)
    monkeypatch.setattr(pipeline, "verify_artefacts", lambda *_, **__: Verification(list(found), {}))
    return found


def test_overwriting_keeps_what_is_not_ours(quick: list[Check], tmp_path: Path) -> None:
    student, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    assert main([student, "--output", str(out), *SHORT]) == 0
    mine = ("student/notes.txt", "student/backup/model.safetensors", "onnx/mine.bin", "engine/mine.txt")
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    earlier = ("student/vocab.json", "onnx/prefill.onnx", "engine/model-8.9.engine", "compressed/config.json")
    for name in earlier:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("of an earlier export")
    assert main([student, "--output", str(out), *SHORT]) == 2  # refused without being asked to
    assert all((out / name).exists() for name in (*mine, *earlier))
    assert main([student, "--output", str(out), *SHORT, "--overwrite"]) == 0
    assert [(out / name).read_text() for name in mine] == ["mine"] * 4
    assert not any((out / name).exists() for name in earlier)
    assert not (out / "compressed").exists()
    assert (out / "onnx/model.onnx").exists() and (out / "student/config.json").exists()


def test_an_export_that_fails_its_verification_replaces_no_good_one(
    quick: list[Check], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    assert main([student, "--output", str(out), *SHORT]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = tiny_folder(tmp_path / "other", seed=5)
    quick.append(Check("onnx", "failed", reason="it differs"))
    assert main([other, "--output", str(out), *SHORT, "--overwrite"]) == 2
    assert "it differs" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    failed = json.loads((out / "failed/report.json").read_text())
    assert failed["verification"][0]["status"] == "failed"
    assert (out / "failed/onnx/model.onnx").read_text() != (out / "onnx/model.onnx").read_text()
    quick.clear()
    assert main([other, "--output", str(out), *SHORT, "--overwrite"]) == 0
    assert (out / "failed/onnx/model.onnx").read_text() == (out / "onnx/model.onnx").read_text()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_is_not_finite_is_refused_before_anything_is_written(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    settings = ExportSettings(formats=("hf",))
    with pytest.raises(ValueError, match="expected finite weights in the model to export, found 1 of .*up_proj"):
        pipeline.export_all(model, byte_tokenizer(), tmp_path / "out", settings, tiny_batch())
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model"), "--output", str(tmp_path / "out")]) == 2
    assert "expected finite weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "student", "onnx", "engine", "compressed"])
def test_a_file_where_a_folder_belongs_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    assert main([tiny_folder(tmp_path / "model"), "--output", str(tmp_path / "out"), "--overwrite"]) == 2
    assert "expected a folder or nothing" in capsys.readouterr().err
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_every_folder_of_an_export_has_its_patterns() -> None:
    assert {pattern.split("/")[0] for pattern in WRITTEN} - set(FILES) == {"report.json", "report.md"}
