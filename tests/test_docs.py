"""What the documentation says is so: settings, losses, benchmarks and links. Its commands run in test_commands_of_docs.py."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import train
from benchmarks import page
from models import Distillation
from models.generation.on_policy import OnPolicy
from models.generation.sampling import Sampling
from models.losses import LOSSES, Objective
from tests.helpers.short_runs import ROOT

RECIPES = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
MIXES = [block for block in re.findall(r"```yaml\n(.*?)```", RECIPES, re.DOTALL) if block.startswith("model:")]
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_of_the_recipes_page_is_an_overlay(
    mix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mix.yaml").write_text(mix)
    overlaid = ["--config", str(ROOT / "configs/distill.yaml"), "--config", str(tmp_path / "mix.yaml")]
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
        path for path in (ROOT / "benchmarks").rglob("*.py") if "if __name__ ==" in path.read_text(encoding="utf-8")
    ]
    commands = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in files}
    named = set(re.findall(r"^\| `python -m (benchmarks[\w.]+)`", BENCHMARKS, re.MULTILINE))
    assert commands - {"benchmarks.workers"} == named


def test_ci_runs_both_commands_of_the_readme_and_holds_its_figures_against_a_run() -> None:
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    for target in ("quickstart", "test"):
        assert f"make {target}" in lines and f"make {target}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert ".venv/bin/python -m benchmarks.quickstart runs/quickstart/report.json --check" in lines


@pytest.mark.parametrize("page", ["README.md", *[f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")]])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_pages_are_a_site_without_a_dead_link(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Potstill" in (tmp_path / "site/project/readme.html").read_text(encoding="utf-8")


def test_the_tables_of_the_studies_are_what_their_rows_give() -> None:
    assert page.main([*map(str, sorted((ROOT / "docs/results").glob("*.md"))), "--check"]) == 0
