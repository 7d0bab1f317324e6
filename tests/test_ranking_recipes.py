"""The predictive workload through the real command line: both recipes on a tiny MovieLens, and a chain that dies and goes on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import train
from export.report import read_metrics
from models import StudentModule
from tests.helpers.same import assert_same
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_folder, tiny_jsonl
from tests.helpers.tiny_movielens import SETTINGS as DATA
from tests.helpers.tiny_movielens import tiny_movielens
from tests.test_recovery import DieBetween, DieInValidation

STEPS, PRUNE, QUANTIZE, VALIDATE = 12, (2, 4), 6, 4
CHAIN = {
    "name": "chain",
    "seed_everything": 3,
    "trainer": {
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "precision": "bf16-mixed",
        "log_every_n_steps": 1,
        "val_check_interval": 2 * VALIDATE,  # micro-batches
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "GradualPruning",
                "init_args": {
                    "mlp_sparsity": 0.5,
                    "depth_sparsity": 0.5,
                    "start_step": PRUNE[0],
                    "end_step": PRUNE[1],
                    "events": 2,
                    "schedule": "linear",
                    "multiple": 8,
                    "calibration_batches": 1,
                    "judge_batches": 1,
                },
            },
            {"class_path": "QuantizationAwareTraining", "init_args": {"start_step": QUANTIZE, "observe_steps": 1}},
            {"class_path": "Throughput", "init_args": {"every_n_steps": 2}},
        ],
    },
    "model": {
        "class_path": "RankingDistillation",
        "init_args": {
            "student": "student",
            "teacher": "teacher",
            "objective": {"cross_entropy": 0.5, "label_kl": 1.0, "full_kl": 0.2},
            "warmup_steps": 2,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        },
    },
    "data": {"class_path": "MovieLens", "init_args": DATA},
    "checkpoint": {"every_n_steps": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranking")
    tiny_folder(folder / "student", seed=1, max_position_embeddings=1024)
    tiny_folder(folder / "teacher", seed=2, max_position_embeddings=1024)
    tiny_movielens(folder / "films")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "chain.yaml").write_text(yaml.safe_dump(CHAIN))
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


# Recipes -------------------------------------------------------------------------------------------------------------


def shortened(name: str, moved: dict[str, dict[str, Any]], model: dict[str, Any]) -> list[str]:
    """A recipe with fewer steps, its callbacks' steps moved, on the tiny data."""
    recipe = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    callbacks = recipe["trainer"]["callbacks"]
    for callback in callbacks:
        callback.setdefault("init_args", {}).update(moved.get(callback["class_path"], {}))
    few = {"max_steps": 6, "val_check_interval": 3, "log_every_n_steps": 1, "enable_progress_bar": False}
    overlay = {
        "trainer": {**few, "callbacks": callbacks},
        "model": {"init_args": {"warmup_steps": 1, **model}},
        "data": {"init_args": DATA},
    }
    Path(f"{name}-short.yaml").write_text(yaml.safe_dump(overlay))
    return ["--config", f"configs/{name}.yaml", "--config", f"{name}-short.yaml"]


@pytest.mark.recipe
def test_the_teacher_is_fine_tuned_and_half_of_it_learns_from_it() -> None:
    """Both recipes with their own callbacks, data and objective, and then the test of the student."""
    recipe = shortened("ranking_teacher", {}, {"student": "teacher"})
    assert train.entry_point(["fit", *recipe, "--run_dir", "runs/ranking/teacher"]) == 0
    taught = read_metrics(Path("runs/ranking/teacher/metrics.csv"))
    assert {"train/cross_entropy", "val/auroc", "val/user_auroc", "val/log_loss", "val/ece"} <= taught.keys()
    assert not any("teacher" in name for name in taught)

    moved = {
        "GradualPruning": {"start_step": 1, "end_step": 2, "events": 2, "calibration_batches": 1},
        "Throughput": {"every_n_steps": 2},
        "ExportOnFitEnd": {"verify_prompts": 1},
    }
    recipe = shortened("ranking", moved, {"resamples": 20})
    assert train.entry_point(["fit", *recipe]) == 0
    run = Path("runs/ranking-001")
    assert AutoModelForCausalLM.from_pretrained(run / "student", trust_remote_code=False).config.num_hidden_layers == 1
    report = json.loads((run / "report.json").read_text())
    assert {check["status"] for check in report["verification"]} == {"passed"}
    figures = read_metrics(run / "metrics.csv")
    assert {"train/cross_entropy", "train/label_kl", "train/full_kl", "val/kl"} <= figures.keys()
    for (step, ours), (_, theirs), (_, difference) in zip(
        figures["val/log_loss"], figures["val/teacher_log_loss"], figures["val/log_loss_difference"], strict=True
    ):
        assert step and ours - theirs == pytest.approx(difference, abs=1e-5)
    assert len({theirs for _, theirs in figures["val/teacher_auroc"]}) == 1

    last = str(run / "checkpoints/last.ckpt")
    cli = train.main(["test", *recipe, "--ckpt_path", last])
    tested = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    for name in ("auroc", "user_auroc", "log_loss", "ece"):
        for column in ("test/{}", "test/teacher_{}", "test/{}_difference"):
            key = column.format(name)
            assert tested[f"{key}_low"] <= tested[f"{key}_high"]
    assert tested["test/log_loss_low"] < tested["test/log_loss"] < tested["test/log_loss_high"]


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (["--model.init_args.teacher", "null"], "expected model.teacher for cross_entropy and label_kl and full_kl"),
        (["--model.init_args.objective.label_kl", "-1"], "found cross_entropy 0.5, label_kl -1, full_kl 0.2"),
        (["--data.init_args.labels", '["no", "yes"]'], "expected every label as one token"),
        (["--data", "Conversations", "--data.init_args.train", "chain.jsonl"], "expected a data module of samples"),
    ],
    ids=["no teacher", "negative weight", "split label", "no labels"],
)
def test_a_mistake_is_one_sentence(mistake: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_jsonl(Path("chain.jsonl"), [(f"{number} plus {number}?", "a") for number in range(30)])
    arguments = [] if "--data" in mistake else ["--config", "chain.yaml"]
    if not arguments:
        arguments = [
            "--model",
            "RankingDistillation",
            "--model.init_args.student",
            "student",
            "--trainer.max_steps",
            "1",
        ]
    try:
        status = train.entry_point(["fit", *arguments, *mistake, "--root", "mistakes"])
    except SystemExit as stop:  # the parser's own refusal
        status = int(stop.code or 0)
    message = capsys.readouterr().err
    assert status == 2
    assert named in message
    assert os.listdir("mistakes") == [] if Path("mistakes").exists() else True


# A chain that dies ---------------------------------------------------------------------------------------------------


def chain(*more: str) -> train.PotstillCLI:
    return train.main(["fit", "--config", "chain.yaml", *more])


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> train.PotstillCLI:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return chain("--root", "whole")


@pytest.mark.parametrize(
    ("death", "step"),
    [(DieBetween, PRUNE[0] + 1), (DieInValidation, VALIDATE), (DieBetween, QUANTIZE), (DieInValidation, 2 * VALIDATE)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    death: type, step: int, uninterrupted: train.PotstillCLI, tmp_path: Path
) -> None:
    """Weights, scales, optimizer and figures bit for bit, between the events of pruning, after them, and while quantizers observe."""
    with pytest.raises(RuntimeError, match="died"):
        chain("--root", str(tmp_path), f"--trainer.callbacks+=tests.test_recovery.{death.__name__}",
              f"--trainer.callbacks.step={step}")  # fmt: skip
    last = tmp_path / "chain-001/checkpoints/last.ckpt"
    # A step is saved after the validation that belongs to it: one that died in between is done again.
    assert torch.load(last, weights_only=True)["global_step"] == step - (death is DieInValidation)
    resumed = chain("--root", str(tmp_path), "--ckpt_path", str(last))
    assert_same(resumed.model.state_dict(), uninterrupted.model.state_dict())
    assert_same(resumed.trainer.optimizers[0].state_dict(), uninterrupted.trainer.optimizers[0].state_dict())
    assert resumed.model.edits == uninterrupted.model.edits
    ours, theirs = (read_metrics(Path(cli.run_dir) / "metrics.csv") for cli in (resumed, uninterrupted))
    for name in ("train/loss", "train/label_kl", "val/auroc", "val/teacher_auroc", "val/user_auroc_difference"):
        first = ours[name][0][0]
        assert ours[name] == [point for point in theirs[name] if point[0] >= first], name


def test_the_uninterrupted_run_had_all_of_it(uninterrupted: train.PotstillCLI) -> None:
    """Otherwise the comparison above would show nothing."""
    model = uninterrupted.model
    assert isinstance(model, StudentModule)
    assert {edit["op"] for edit in model.edits} == {"narrow_mlp", "drop_layers", "fake_quantize"}
    assert model.student.config.num_hidden_layers == 1 and model.student.config.intermediate_size == 24
    figures = read_metrics(Path(uninterrupted.run_dir) / "metrics.csv")
    assert len(figures["val/auroc"]) == STEPS // VALIDATE
    assert len({value for _, value in figures["val/auroc"]}) > 1
    assert any(value for name in figures if name.startswith("throughput/share_teacher") for _, value in figures[name])
