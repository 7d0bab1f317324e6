"""Settings, data, checkpoints and folders that nobody thought of: accepted and usable, or refused in one sentence; no file is lost.

`make test` draws a few, the same ones every time; `make fuzz` draws 2,000 (`FUZZ_EXAMPLES`).
"""

import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import export.__main__ as exporting
import export.benchmark.__main__ as benchmarking
import export.serving.__main__ as serving
import models.offline.__main__ as offline
import train
from datamodules import Conversations
from export import chat
from program.screen import as_command
from tests.helpers.same import assert_same
from tests.helpers.tiny import tiny_folder, tiny_jsonl

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
LAST = Path("runs/run-001/checkpoints/last.ckpt")

fuzz = pytest.mark.fuzz


def share(part: float) -> Any:
    """So many of the examples, the same ones every time."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=max(1, round(EXAMPLES * part)),
        deadline=None,
        derandomize=True,
        suppress_health_check=checks,
        database=None,
    )


numbers = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 0.5, -0.0, 1e9, 1e300, math.nan, math.inf, -math.inf, 2**63, -(2**63)]),
    st.integers(-5, 100),
    st.floats(),
)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=12)),
    lambda some: st.one_of(st.lists(some, max_size=3), st.dictionaries(st.text(max_size=8), some, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data and a run of one step; the tests of this file work there."""
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    os.chdir(folder)
    try:
        tiny_folder(folder / "student", seed=1)
        tiny_jsonl(folder / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(8)])
        assert train.entry_point(fit("--trainer.max_steps", "1")) == 0
        yield folder
    finally:
        os.chdir(before)


def fit(*more: str) -> list[str]:
    student = ["--model", "SFT", "--model.init_args.student", "student"]
    data = ["--data", "Conversations", "--data.init_args.train", "my.jsonl", "--data.init_args.val", "my.jsonl"]
    return ["fit", *student, *data, "--trainer.accelerator", "cpu", *more]


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (*Path("student").iterdir(), Path("my.jsonl"), LAST)}


def answers(run: Callable[[], int], name: str) -> bool:
    """Whether it was accepted; if not, then in one sentence.  What was there stays there."""
    before, said = files(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            status = run()
        except SystemExit as stop:  # of a parser
            status = int(stop.code or 0)
    assert files() == before, f"{name} changed a file"
    assert status in (0, 2), (name, status, said.getvalue())
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert len(errors) == (1 if status else 0), (name, said.getvalue())
    assert "Traceback" not in said.getvalue()
    return status == 0


def loads(source: Path) -> bool:
    """Whether a student is taken; what is taken computes."""

    @as_command
    def load(_: Any) -> int:
        model, tokenizer = exporting.load_any(str(source), None)
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([tokenizer("hello").input_ids or [1]])).logits
        assert logits.isfinite().all()
        return 0

    return answers(lambda: load(None), str(source))


@fuzz
@share(0.25)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_checkpoint_that_decayed_is_refused(place: Path, where: float, bit: int, cut: bool) -> None:
    content = bytearray(LAST.read_bytes())
    at = int(where * len(content))
    content[at] ^= 1 << bit
    Path("decayed.ckpt").write_bytes(content[:at] if cut else content)
    if loads(Path("decayed.ckpt")):
        assert not cut
        ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in ("decayed.ckpt", LAST))
        assert_same(ours, theirs)  # what decayed was no weight


@fuzz
@share(0.15)
@given(data=st.data())
def test_settings_of_a_checkpoint_are_data(place: Path, data: st.DataObject) -> None:
    checkpoint = torch.load(LAST, weights_only=True)
    part = data.draw(st.sampled_from([checkpoint, checkpoint["hyper_parameters"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(plain)
    torch.save(checkpoint, "other.ckpt")
    loads(Path("other.ckpt"))


@fuzz
@share(0.2)
@given(data=st.data())
def test_a_folder_is_what_it_says(place: Path, data: st.DataObject) -> None:
    shutil.rmtree("folder", ignore_errors=True)
    shutil.copytree("student", "folder")
    path = Path("folder") / data.draw(st.sampled_from(sorted(os.listdir("student"))))
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        content[data.draw(st.sampled_from([*sorted(content), "quantization_config", "auto_map"]))] = data.draw(plain)
        path.write_text(json.dumps(content))
    else:
        raw = bytearray(path.read_bytes())
        raw[data.draw(st.integers(0, min(len(raw), 4000) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
    loads(Path("folder"))


MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name"]),
        st.one_of(plain, st.sampled_from(["user", "assistant", "system"])),
        max_size=3,
    ),
    max_size=4,
)
RECORDS = st.dictionaries(
    st.sampled_from(["prompt", "response", "messages", "text"]),
    st.one_of(st.text(max_size=20), MESSAGES, plain),
    max_size=3,
)


@fuzz
@share(0.2)
@given(lines=st.lists(st.one_of(RECORDS.map(json.dumps), st.text(max_size=30)), max_size=4), good=st.booleans())
def test_data_is_taken_or_its_line_is_named(place: Path, lines: list[str], good: bool) -> None:
    text = "\n".join([*lines, '{"prompt": "1 plus 1?", "response": "2"}'] if good else lines)
    Path("drawn.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")

    @as_command
    def read(_: Any) -> int:
        data = Conversations(tokenizer="student", train="drawn.jsonl", batch_size=2)
        data.setup("fit")
        assert all((batch["labels"] != -100).any() for batch in islice(data.train_dataloader(), 2))
        return 0

    answers(lambda: read(None), repr(text))


SETTINGS = (
    *(
        "trainer.accumulate_grad_batches",
        "trainer.limit_train_batches",
        "trainer.gradient_clip_val",
        "trainer.log_every_n_steps",
    ),
    *("trainer.precision", "trainer.val_check_interval", "trainer.devices", "trainer.callbacks", "trainer.max_time"),
    *(
        "model.init_args.warmup_steps",
        "model.init_args.lr_schedule",
        "model.init_args.optimizer",
        "model.init_args.student",
    ),
    *("data.init_args.batch_size", "data.init_args.val_fraction", "data.init_args.max_length", "data.init_args.train"),
    *("data.init_args.seed", "checkpoint.every_n_steps", "seed_everything", "name"),
)


@fuzz
@share(0.1)
@given(key=st.sampled_from(SETTINGS), value=plain, junk=st.text(max_size=10))
def test_a_setting_has_its_range(place: Path, key: str, value: Any, junk: str) -> None:
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    Path("drawn.yaml").write_text(yaml.safe_dump(nested) + (f"\n{junk}" if len(junk) == 10 else ""))
    shutil.rmtree("out", ignore_errors=True)
    answers(
        lambda: train.entry_point(fit("--config", "drawn.yaml", "--trainer.max_steps", "1", "--root", "out")),
        repr(nested),
    )


QUICK = ["--engine", "none", "--prompts", "1", "--decode-steps", "0", "--benchmark-repetitions", "0"]
OFFLINE = ["--model", "Distillation", "--model.init_args.student", "student", "--model.init_args.teacher", "student"]
DATA = ["--data", "Conversations", "--data.init_args.train", "my.jsonl"]
#: Main function, words that it always gets, and options that are drawn.
COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str], str]] = {
    "export": (
        exporting.main,
        ["student", "--output", "out"],
        "--decode-steps --prompts --threads --benchmark-repetitions --opset --precision --sequence --cpu --engine --labels",
    ),
    "benchmark": (
        benchmarking.main,
        ["exported"],
        "--prompts --batches --new-tokens --repetitions --threads --runtimes --json --plot",
    ),
    "serving": (
        serving.main,
        ["exported", "--overwrite", "--output", "served"],
        "--name --max-batch-size --threads --output",
    ),
    "chat": (
        chat.main,
        ["exported", "--max-new-tokens", "2", "--length", "64", "--prompt", "hello"],
        "--temperature --top-p --seed --max-new-tokens --length --threads --prompt --system",
    ),
    "offline": (
        offline.main,
        ["--output", "captured", *OFFLINE, *DATA],
        "--form --top_k --splits --dtype --batch_size --shard_tokens --device --output --config",
    ),
}  # fmt: skip
VALUES = st.one_of(
    numbers.map(str), st.sampled_from(["int8", "fp8", "none", "", "torch", "student", "x.json", "x.png"])
)


@pytest.fixture(scope="module")
def exported(place: Path) -> None:
    assert exporting.main(["student", "--output", "exported", *QUICK]) == 0


@pytest.mark.parametrize("command", COMMANDS)
@fuzz
@share(0.04)
@given(data=st.data())
def test_options_have_their_range(place: Path, exported: None, command: str, data: st.DataObject) -> None:
    """What takes long is left out: the export itself, and measurements."""
    main, always, options = COMMANDS[command]
    pairs = st.lists(st.tuples(st.sampled_from(options.split()), VALUES), max_size=3)
    words = [*always, *(word for pair in data.draw(pairs) for word in pair)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_export", lambda *_: 0)
        patch.setattr(benchmarking, "compare", lambda artefacts, *_, **__: [{"name": each.name} for each in artefacts])
        patch.setattr(benchmarking, "text", lambda _: "")
        patch.setattr(benchmarking, "plot", lambda _, path: path.touch())
        shutil.rmtree("captured", ignore_errors=True)
        answers(lambda: main(words), repr(words))
