"""The plan of a recipe, through the command line, for models whose dimensions are public; no weight is there to be loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

import train
from models.loading.reference import load_model_config
from models.planning.memory import StepSettings
from models.planning.plan import GPUS, Machine, Workload, memory, phases
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_folder

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
QWEN: dict[str, Any] = {**LLAMA, "model_type": "qwen3", "vocab_size": 151936}
#: From the models' config.json on the Hugging Face hub: meta-llama/Llama-3.1-8B, Llama-3.1-70B, Qwen/Qwen3-32B.
PUBLIC: dict[str, dict[str, Any]] = {
    "8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "32b": {
        **QWEN,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
}
#: As their model cards say, in billions.
PARAMETERS = {"8b": 8.03, "70b": 70.55, "32b": 32.76}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, fields in PUBLIC.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def models(student: str, teacher: str) -> list[str]:
    return ["--model.init_args.student", student, "--model.init_args.teacher", teacher]


def planned(*options: str) -> dict[str, Any]:
    assert train.entry_point(["plan", "--config", "configs/distill.yaml", "--json_file", "plan.json", *options]) == 0
    found: dict[str, Any] = json.loads(Path("plan.json").read_text())
    return found


def test_what_fits_is_said_and_holds(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = [*models("8b", "70b"), "--gpus", "8", "--gpu", "h200", "--data.init_args.max_length", "256"]
    plan = planned(*gpus, "--price", "3", "--budget", "1000", "--picture", "plan.png")
    words = capsys.readouterr().out
    parts = plan["memory"]["parts"]
    assert parts["weights"] == pytest.approx(4e9 * PARAMETERS["8b"], rel=1e-3)
    assert parts["teacher"] == pytest.approx(2e9 * PARAMETERS["70b"], rel=1e-3)
    assert "teacher                      141.1 GB" in words
    assert "It does not fit; with --config configs/" in words
    assert plan["memory_then"]["peak"] <= plan["memory_then"]["usable"]
    assert plan["costs"]["money"] == pytest.approx(3 * plan["costs"]["gpu_hours"])
    phases_ = {row["phase"] for row in plan["phases"]}
    assert phases_ == {"answers of the data", "own answers: learning", "own answers: sampling"}
    assert "best by [1]" in words
    assert Path("plan.png").stat().st_size > 10_000
    assert not Path("runs").exists()
    # With the overlays that it names, it says so itself.
    overlays = [word for name in plan["fits_with"] for word in ("--config", f"configs/{name}.yaml")]
    again = planned(*overlays, *gpus)
    assert again["fits_with"] == []
    assert again["memory"]["peak"] == pytest.approx(plan["memory_then"]["peak"], rel=0.01)


@pytest.mark.parametrize(
    "recipe", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if "\nname: " in path.read_text())
)
def test_every_recipe_can_be_planned(recipe: str, place: Path) -> None:
    tiny_folder(place / "tiny")
    teacher = "teacher: " in (ROOT / f"configs/{recipe}.yaml").read_text()
    references = models("tiny", "tiny") if teacher else models("tiny", "tiny")[:2]
    command = ["plan", "--config", f"configs/{recipe}.yaml", *references, "--json_file", "plan.json"]
    assert train.entry_point(command) == 0
    plan = json.loads(Path("plan.json").read_text())
    assert plan["fits_with"] == []
    assert ("pruning event" in plan["memory"]["moments"]) == (
        "GradualPruning" in (ROOT / f"configs/{recipe}.yaml").read_text()
    )
    assert bool(plan["memory"]["parts"]["teacher"]) == teacher


def test_a_family_that_is_no_llama(place: Path) -> None:
    plan = planned(*models("32b", "32b"), "--gpus", "16", "--data.init_args.max_length", "64")
    assert plan["memory"]["parts"]["weights"] == pytest.approx(4e9 * PARAMETERS["32b"], rel=1e-3)


def test_hours_by_hand(place: Path) -> None:
    """6 N D and 2 N_teacher D, where all tokens are answers and samples are too short for attention to matter."""
    ours, theirs = load_model_config("8b"), load_model_config("70b")
    work = Workload(ours, theirs, StepSettings(16, 2, answer_share=1.0), steps=1000, accumulate=4, mean_length=1.0)
    (row,) = phases(work, Machine(8, GPUS["h100"], sharded=True, utilisation=0.5))
    tokens = 1000 * 16 * 4 * 8
    used = 8.03e9 - 128256 * 4096, 70.55e9 - 128256 * 8192  # an embedding is looked up, not multiplied
    expected = (6 * used[0] + 2 * used[1]) * tokens
    assert row["flops"] == pytest.approx(expected, rel=2e-3)
    assert row["hours"] == pytest.approx(expected / (8 * 989e12 * 0.5) / 3600, rel=2e-3)


def test_shards_hold_less(place: Path) -> None:
    step = StepSettings(batch_size=1, length=512)
    work = Workload(load_model_config("8b"), load_model_config("70b"), step, steps=10, accumulate=1, mean_length=256.0)
    alone, eight = (memory(work, Machine(8, GPUS["h100"], sharded, 0.4)) for sharded in (False, True))
    assert eight["parts"]["teacher"] == alone["parts"]["teacher"] // 8
    assert eight["parts"]["activations"] == alone["parts"]["activations"]
    assert eight["peak"] < alone["peak"] / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--utilisation", "0"], "utilisation"),
        (["--gpus", "0"], "gpus"),
        (["--model.init_args.student", "nowhere/at/all"], "expected a Hugging Face folder at 'nowhere/at/all'"),
        (["--gpu", "h999"], "h999"),
        (["--picture", "plan.xyz"], "expected a --picture that ends with .png or .svg, found 'plan.xyz'"),
    ],
    ids=["utilisation", "gpus", "model", "gpu", "picture"],
)
def test_a_mistake_is_one_sentence(
    place: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--config", "configs/distill.yaml", *models("8b", "70b"), *options]
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(train.entry_point(command))
    assert stop.value.code == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in error
    assert not Path("runs").exists()
