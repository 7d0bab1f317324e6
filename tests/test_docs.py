"""The documentation is run: what a user would copy from README and how-to, on a tiny model."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import wandb
import yaml
from tiny import tiny_folder
from transformers import AutoModelForCausalLM

import export.__main__ as export_main
import models.offline.__main__ as offline_main
import train
from models import Distillation
from models.losses import LOSSES, Objective
from models.on_policy import OnPolicy
from models.sampling import Sampling

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOWTO = (ROOT / "docs/howto-own-model-and-data.md").read_text(encoding="utf-8")
OFFLINE = (ROOT / "docs/howto-offline-teacher.md").read_text(encoding="utf-8")
MEMORY = (ROOT / "docs/howto-memory.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
MIXES = [block for block in re.findall(r"```yaml\n(.*?)```", RECIPES, re.DOTALL) if block.startswith("model:")]
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The commands of all ```bash blocks, continued lines joined, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip() and not line.startswith("#")]


def train_arguments(text: str) -> list[list[str]]:
    """The arguments of all `python train.py` commands."""
    return [words[words.index("train.py") + 1 :] for words in commands(text) if "train.py" in words]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's folder as the user sees it: the recipes, two models, a file of conversations."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    tiny_folder(folder / "my-model", seed=1)
    tiny_folder(folder / "my-teacher", seed=2)
    rows = [{"prompt": f"What is {n} plus {n + 1}?", "response": str(2 * n + 1)} for n in range(80)]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overlay = re.search(r"```yaml\n(# short\.yaml\n.*?)```", HOWTO, re.DOTALL)
    assert overlay, "the how-to has no block that starts with '# short.yaml'"
    (folder / "short.yaml").write_text(overlay[1])
    split = next(words for words in commands(HOWTO) if words[0] == "awk")
    subprocess.run(split, cwd=folder, check=True)
    return folder


@pytest.fixture(autouse=True)
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def test_the_split_of_the_howto_loses_nothing(workspace: Path) -> None:
    parts = [(workspace / name).read_text().splitlines() for name in ("my-train.jsonl", "my-test.jsonl")]
    assert sorted(parts[0] + parts[1]) == sorted((workspace / "my.jsonl").read_text().splitlines())
    assert len(parts[1]) == 8


@pytest.mark.parametrize("arguments", train_arguments(README + HOWTO + MEMORY), ids=" ".join)
def test_every_train_command_is_accepted(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if "--ckpt_path" in arguments:  # there is a checkpoint only after a run; see the test of the how-to
        position = arguments.index("--ckpt_path")
        arguments = arguments[:position] + arguments[position + 2 :]
    if any(argument.startswith("runs/") for argument in arguments):
        arguments = [argument.replace("runs/sft-001/config.yaml", "configs/sft.yaml") for argument in arguments]
    asks_for_help = any("help" in argument for argument in arguments)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments if asks_for_help else [*arguments, "--print_config"])
    assert stop.value.code == 0
    assert ("usage" in capsys.readouterr().out.lower()) == asks_for_help


@pytest.fixture(scope="module")
def runs(workspace: Path) -> Path:
    """All commands of the how-to in order; two without a step limit are cut short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        for arguments in train_arguments(HOWTO):
            text = " ".join(arguments)
            if "compress.yaml" in text and "short.yaml" not in text:
                continue  # 3,000 steps; the short run is the same recipe
            if "max_steps" not in text and "short.yaml" not in text:
                arguments = [*arguments, "--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]
            assert train.entry_point(arguments) == 0, text
    wandb.finish()  # a run that is still open would take in the next test's
    return workspace / "runs"


@pytest.mark.recipe
def test_the_howto_works_from_data_to_resumed_student(runs: Path) -> None:
    run = runs / "compress-short-001"
    report = json.loads((run / "report.json").read_text())
    assert [phase["name"] for phase in report["phases"]] == ["pruned", "recovered", "quantized"]
    assert {check["status"] for check in report["verification"]} == {"passed"}
    student = AutoModelForCausalLM.from_pretrained(run / "student", trust_remote_code=False)
    assert sum(p.numel() for p in student.parameters()) == report["phases"][-1]["parameters"]
    resumed = json.loads((runs / "compress-short-002/report.json").read_text())
    assert resumed["phases"] == report["phases"]
    assert resumed["teacher"] == report["teacher"]
    assert list((runs / "sft-wandb-001/wandb").glob("offline-run-*"))


@pytest.mark.recipe
def test_the_readmes_export_command_works(runs: Path, workspace: Path) -> None:
    words = next(words for words in commands(README) if words[1:3] == ["-m", "export"])
    assert export_main.main([*words[3:], "--engine", "none", "--benchmark-repetitions", "1"]) == 0
    report = json.loads((workspace / "exported/report.json").read_text())
    assert {check["status"] for check in report["verification"]} == {"passed"}


@pytest.mark.recipe
def test_the_offline_howto_works_from_capture_to_training(workspace: Path) -> None:
    captures = [words for words in commands(OFFLINE) if words[1:3] == ["-m", "models.offline"]]
    assert captures
    for words in captures:
        assert offline_main.main(words[3:]) == 0
    assert (workspace / "teacher-cache/index.json").is_file()
    trainings = train_arguments(OFFLINE)
    assert trainings
    short = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--root", "offline-runs"]
    short.append("--trainer.callbacks=[]")  # the recipe's export has tests of its own
    for arguments in trainings:
        assert train.entry_point([*arguments, *short]) == 0, arguments
    assert (workspace / "offline-runs/distill-001/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_of_the_recipes_page_is_an_overlay(
    mix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mix.yaml").write_text(mix)
    overlaid = ["--config", "configs/distill.yaml", "--config", str(tmp_path / "mix.yaml")]
    with pytest.raises(SystemExit) as stop:
        train.main(["fit", *overlaid, "--print_config"])
    assert stop.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    stated = yaml.safe_load(mix)["model"]["init_args"]
    for name in ("objective", "on_policy_objective"):
        if name in stated:
            assert settings[name]["weights"] == stated[name]["weights"]
    Distillation(**{"student": "unread", "teacher": "unread"} | stated)  # refuses what is out of range


def test_the_recipes_page_names_every_setting_of_distillation() -> None:
    for group, prefix in ((Objective, "objective."), (OnPolicy, "on_policy."), (Sampling, "sampling.")):
        for field in fields(group):
            assert f"| `{prefix}{field.name}` |" in RECIPES, field.name
    for name in LOSSES:
        assert f"`{name}`" in RECIPES, name


def test_the_benchmarks_page_names_every_benchmark() -> None:
    files = [
        path for path in (ROOT / "benchmarks").glob("*.py") if "if __name__ ==" in path.read_text(encoding="utf-8")
    ]
    public = {path.stem for path in files} - {"workers"}
    assert public == set(re.findall(r"^\| `python -m benchmarks\.(\w+)`", BENCHMARKS, re.MULTILINE))


def test_every_make_target_of_the_readme_exists() -> None:
    targets = [words[1] for words in commands(README) if words[0] == "make"]
    assert targets == ["quickstart", "test"]
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, env={**os.environ})
        assert done.returncode == 0, done.stderr


def test_ci_runs_the_commands_of_the_readme() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    for target in ("quickstart", "test"):
        assert f"make {target}" in lines and f"make {target}\n" in README
    assert ".venv/bin/python -m benchmarks.quickstart runs/quickstart/report.json --check" in lines


@pytest.mark.parametrize("page", ["README.md", *[f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")]])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target
