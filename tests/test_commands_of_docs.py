"""Every command and every program of README and how-tos is run, in the order of its page, with tiny models in the place of real ones.

Recipes are cut to a few steps where a command asks for no small number itself.  What cannot run here is listed with where it runs.
"""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import wandb
import yaml
from transformers import AutoModelForCausalLM

import export.__main__ as export_main
import export.benchmark.__main__ as benchmark_main
import export.serving.__main__ as serving_main
import models.offline.__main__ as offline_main
import train
from datamodules.chat import Conversation, encode
from export import chat
from export.options import calibration_of, parser, settings_of
from tests.helpers.chat_doubles import byte_tokenizer
from tests.helpers.short_runs import ROOT, short
from tests.helpers.tiny import tiny_folder

OWN = "docs/howto-own-model-and-data.md"
PAGES = ["README.md", "docs/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("howto-*.md"))]
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "python train.py": train.entry_point,
    "python -m export": export_main.main,
    "python -m export.serving": serving_main.main,
    "python -m export.benchmark": benchmark_main.main,
    "python -m export.chat": chat.main,
    "python -m models.offline": offline_main.main,
}
#: Beginnings of commands that do not run here, and where they do.
ELSEWHERE = {
    "make ": "CI runs both targets",
    "pip install": "CI installs",
    "vllm serve": "make test-servers",
    "docker run": "make test-servers",
    "python train.py fit --config configs/distill.yaml --config configs/fsdp.yaml": "several GPUs; test_configs.py has two processes",
    "python train.py fit --config configs/ranking": "tests/test_ranking_recipes.py",
    "python train.py test --config configs/ranking": "tests/test_ranking_recipes.py",
    "python -m export runs/compress-001/checkpoints/last.ckpt --output exported-sm89": "tests/export/engine/test_to_tensorrt.py",
    "python -m export package:smollm2-135m-instruct": "tests/export/engine/test_to_tensorrt.py",
    "python -m export.chat runs/quickstart": "tests/test_train.py",
    "python -m export.benchmark exported": "tests/export/benchmark/test_benchmark.py",
    "python -m benchmarks.chats": "tests/benchmarks/test_chats.py",
    "python -m benchmarks.memory": "tests/benchmarks/test_memory.py",
    "python -m benchmarks.ranking": "tests/benchmarks/ranking/test_ranking.py",
    "python -m benchmarks.ranking.study": "tests/benchmarks/ranking/test_study.py",
}
#: Programs in Python that do not run here.
CLIENTS = {
    "tritonclient": "tests/export/serving/test_serving.py",
    "export.serving.scorer": "test_ranking_howto.py looks at what it prints",
}
#: Words of commands: the tiny tokenizer has no labels of one token but letters.
REPLACED = {"package:smollm2-135m-instruct": "my-model", "no": "n", "yes": "y"}


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of all fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The commands of a block, continued lines joined."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def elsewhere(command: str) -> bool:
    return any(command.startswith(beginning) for beginning in ELSEWHERE)


def cut(arguments: list[str], folder: Path) -> list[str]:
    """A training in few steps: an overlay behind the recipe, unless the command has a small number of steps itself."""
    text = " ".join(arguments)
    recipe = re.search(r"configs/(\w+)\.yaml", text)
    if arguments[0] not in ("fit", "test") or recipe is None:
        return arguments
    overlay = {} if "max_steps" in text or "short.yaml" in text else short(recipe[1])
    for callback in overlay.get("trainer", {}).get("callbacks", ()):
        if callback["class_path"] == "ExportOnFitEnd":  # short.yaml and test_configs.py write graphs
            callback["init_args"]["formats"] = ["hf"]
    files = [position for position, word in enumerate(arguments) if word == "--config"]
    if "ckpt_path" in text and arguments[0] == "fit" and "short.yaml" not in text:
        overlay["trainer"]["max_steps"] += 2  # a resumed run goes on
    (folder / "cut.yaml").write_text(yaml.safe_dump(overlay))
    behind = files[0 if "ranking.yaml" in text else -1] + 2  # ranking.yaml replaces the data
    return [*arguments[:behind], "--config", "cut.yaml", *arguments[behind:]]


def run(command: str, folder: Path) -> None:
    words = [REPLACED.get(word, word) for word in shlex.split(command)]
    settings = [words.pop(0).split("=", 1) for word in list(words) if re.match(r"[A-Z_]+=", word)]
    if words[0] == "awk":
        subprocess.run(words, check=True)
        return
    begin = 2 if words[1] == "train.py" else 3
    program, arguments = " ".join(words[:begin]), words[begin:]
    assert program in PROGRAMS, f"{command}: run it here, or list where it runs"
    if any("help" in argument for argument in arguments):
        with pytest.raises(SystemExit) as stop:
            PROGRAMS[program](arguments)
        assert stop.value.code == 0, command
        return
    if program == "python train.py":
        arguments = cut(arguments, folder)
        if "model.init_args.student" not in command and "configs/" in command:
            arguments += ["--model.init_args.student", "my-model"]
    if program == "python -m export":
        arguments += ["--benchmark-repetitions", "0", "--decode-steps", "1", "--prompts", "2"]
    if program == "python -m export.chat":
        arguments += ["--prompt", "Hm?", "--max-new-tokens", "2"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings:
            patch.setenv(name, value)
        assert PROGRAMS[program](arguments) == 0, f"{command}\nwith {arguments}"
    wandb.finish()  # a run that is still open would take in the next one's


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: models, data, a checkpoint of an FP8 run, and what was exported from it."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "configs").symlink_to(ROOT / "configs")
    for seed, name in enumerate(("my-model", "my-teacher"), start=1):
        tiny_folder(folder / name, seed=seed, head_dim=16, max_position_embeddings=768)
    rows = [{"prompt": f"What is {n} plus {n + 1}?", "response": str(2 * n + 1)} for n in range(80)]
    for name in ("my.jsonl", "my-train.jsonl", "calibration.jsonl", "questions.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    films = [{"prefix": f"{n}", "prompt": f"Film {n % 7}", "label": "ny"[n // 2 % 2], "user": n % 5} for n in range(40)]
    for split in ("train", "val", "test"):
        held = films[::2] if split == "train" else [{**row, "prefix": split + row["prefix"]} for row in films[:6]]
        (folder / f"my-candidates-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trained = (
            "--data.init_args.train my.jsonl --model.init_args.teacher my-teacher --model.init_args.student my-teacher"
        )
        run(f"python train.py fit --config configs/compress.yaml {trained}", folder)
        run(
            "python -m export runs/compress-001/checkpoints/last.ckpt --output exported --precision fp8 --engine none",
            folder,
        )
    (folder / "my-quantized-model").symlink_to(folder / "exported/student")
    return folder


@pytest.fixture(scope="module")
def ran(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs a page in a folder of its own, once."""

    @cache
    def page_in_its_folder(page: str) -> Path:
        folder = tmp_path_factory.mktemp("page")
        for path in shelf.iterdir():
            if path.name == "cut.yaml" or (path.name == "exported" and page != "docs/howto-triton.md"):
                continue  # the page writes it
            if path.name == "runs":
                (folder / "runs").mkdir()
                (folder / "runs/compress-001").symlink_to(path / "compress-001")
                (folder / "runs/ranking-001").mkdir()
                (folder / "runs/ranking-001/student").symlink_to(shelf / "my-model")
            elif page != OWN or path.name != "my-train.jsonl":
                (folder / path.name).symlink_to(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for language, text in blocks(page):
                if language == "yaml" and (named := re.match(r"# (\S+\.yaml)\n", text)):
                    (folder / named[1]).write_text(text.replace('"no", "yes"', '"n", "y"'))
                if language == "bash":
                    for command in commands(text):
                        if not elsewhere(command):
                            run(command, folder)
                if language == "python" and not any(client in text for client in CLIENTS):
                    exec(compile(text, page, "exec"), {})
        return folder

    return page_in_its_folder


@pytest.mark.long
@pytest.mark.recipe
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(page: str, ran: Callable[[str], Path]) -> None:
    ran(page)


def test_what_runs_elsewhere_is_in_the_pages_and_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is listed that is not there any more."""
    monkeypatch.chdir(ROOT)
    found = [
        command for page in PAGES for language, text in blocks(page) if language == "bash" for command in commands(text)
    ]
    for beginning, where in ELSEWHERE.items():
        assert any(command.startswith(beginning) for command in found), beginning
        if where.startswith("tests/"):
            assert (ROOT / where).is_file()
    for command in found:
        if "configs/ranking" in command and "--ckpt_path" not in command:
            with pytest.raises(SystemExit) as stop:
                train.main([*shlex.split(command)[2:], "--print_config"])
            assert stop.value.code == 0
        if elsewhere(command) and command.startswith("python -m export "):  # engines take a minute each
            options = parser().parse_args(shlex.split(command)[3:])
            settings_of(options)
            calibration_of(options)


@pytest.mark.long
@pytest.mark.recipe
def test_the_howto_leads_from_data_to_a_resumed_student_that_was_judged_on_the_test_file(
    ran: Callable[[str], Path],
) -> None:
    folder = ran(OWN)
    parts = [(folder / name).read_text().splitlines() for name in ("my-train.jsonl", "my-test.jsonl")]
    assert sorted(parts[0] + parts[1]) == sorted((folder / "my.jsonl").read_text().splitlines())
    assert len(parts[1]) == 8
    run = folder / "runs/compress-short-001"
    report = json.loads((run / "report.json").read_text())
    assert [phase["name"] for phase in report["phases"]] == ["pruned", "recovered", "quantized"]
    assert {check["status"] for check in report["verification"]} == {"passed"}
    listed = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"]
    (phases,) = [callback["init_args"] for callback in listed if callback["class_path"].endswith("PhaseEvaluation")]
    assert phases["split"] is None  # so it is the test file's, see tests/callbacks/test_callbacks.py
    student = AutoModelForCausalLM.from_pretrained(run / "student", trust_remote_code=False)
    assert sum(p.numel() for p in student.parameters()) == report["phases"][-1]["parameters"]
    resumed = json.loads((folder / "runs/compress-short-002/report.json").read_text())
    assert resumed["phases"] == report["phases"]
    assert resumed["teacher"] == report["teacher"]
    assert list((folder / "runs/sft-wandb-001/wandb").glob("offline-run-*"))


@pytest.mark.recipe
def test_the_capture_of_the_howto_is_trained_on(ran: Callable[[str], Path]) -> None:
    folder = ran("docs/howto-offline-teacher.md")
    assert (folder / "teacher-cache/index.json").is_file()
    assert "offline:teacher-cache" in next(folder.glob("runs/distill-*/config.yaml")).read_text()


@pytest.mark.long
@pytest.mark.recipe
def test_the_code_of_the_ranking_howto_ranks_films(
    ran: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "docs/howto-ranking.md"
    monkeypatch.chdir(ran(page))
    assert list(Path("exported-engine/engine").glob("labels-*.engine"))
    (code,) = [text for language, text in blocks(page) if language == "python"]
    assert '("no", "yes")' in code
    capsys.readouterr()
    names: dict[str, object] = {}
    exec(code.replace('("no", "yes")', '("n", "y")'), names)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(" ", 1)[1] for line in lines) == sorted(names["films"])
    probabilities = [float(line.split(" ", 1)[0]) for line in lines]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 <= probability <= 1 for probability in probabilities)


def test_the_chat_template_of_the_howto_makes_a_base_model_chat() -> None:
    (template,) = [text for language, text in blocks(OWN) if language == "jinja"]
    tokenizer = byte_tokenizer(chat_template=template)
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "2+2?"), ("assistant", "4")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (example,) = encode(tokenizer, [Conversation(messages, "here")])
    assert (
        tokenizer.decode(example.input_ids) == "User: hi\nAssistant: ho<|im_end|>\nUser: 2+2?\nAssistant: 4<|im_end|>"
    )
    answers = [tokenizer.decode(example.input_ids[start:end]) for start, end in example.answer_spans]
    assert answers == [" ho<|im_end|>", " 4<|im_end|>"]


def test_ci_runs_the_commands_of_the_readme() -> None:
    targets = [
        command.split()[1]
        for _, text in blocks("README.md")
        for command in commands(text)
        if command.startswith("make ")
    ]
    assert targets == ["quickstart", "test"]
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, env={**os.environ})
        assert done.returncode == 0, done.stderr
