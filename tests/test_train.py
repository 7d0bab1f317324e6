"""The command line as people use it: runs, resumes, mistakes, kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer

import train
from benchmarks import quickstart
from callbacks import Checkpoint
from export import chat
from export.report import read_metrics
from export.verify import faithfulness
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_folder, tiny_jsonl

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "student": tiny_folder(folder / "student", seed=1),
        "teacher": tiny_folder(folder / "teacher", seed=2),
        "unknown": tiny_folder(folder / "unknown", "gpt2", n_embd=32, n_layer=1, n_head=2),
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the recipes and a file of conversations."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tiny_jsonl(tmp_path / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(30)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sft(models: dict[str, str], *more: str, steps: int = 4) -> list[str]:
    """A short fine-tuning run."""
    overlay = Path("short.yaml")
    overlay.write_text(
        yaml.safe_dump(
            {
                "trainer": {"max_steps": steps, "val_check_interval": 2, "precision": "32-true", "callbacks": []},
                "checkpoint": {"every_n_steps": 1},
                "model": {"init_args": {"warmup_steps": 1, "generate_tokens": 3}},
                "data": {"init_args": {"batch_size": 4}},
            }
        )
    )
    student = ["--model.init_args.student", models["student"], "--data.init_args.train", "my.jsonl"]
    return ["fit", "--config", "configs/sft.yaml", "--config", "short.yaml", *student, *more]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "\nname: " in r.read_text()], ids=lambda recipe: recipe.stem)
def test_every_recipe_is_accepted_and_complete(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["fit", "--config", str(recipe), "--config", str(ROOT / "configs/wandb.yaml"), "--print_config"])
    assert stop.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["name"] == recipe.stem.replace("_", "-")
    assert [logger["class_path"].rpartition(".")[2] for logger in resolved["trainer"]["logger"]] == [
        "CSVLogger",
        "WandbLogger",
    ]


@pytest.mark.recipe
def test_the_quickstart_runs_on_a_tiny_model(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both parts, their own callbacks and data, with fewer steps."""
    monkeypatch.setattr(faithfulness, "TOKENS", 16)  # 8 questions
    data = {"train_size": 48, "val_size": 6, "test_size": 12, "batch_size": 4, "eval_batch_size": 6}
    Path("teacher.yaml").write_text(
        yaml.safe_dump(
            {"trainer": {"max_steps": 3}, "data": {"init_args": data}, "model": {"init_args": {"warmup_steps": 1}}}
        )
    )
    # Attention of graphs for CPUs wants heads of 16, 32, ... numbers.
    student = [
        "--model.init_args.student",
        tiny_folder(place / "model", seed=1, head_dim=16, max_position_embeddings=1024),
    ]
    recipe = ["fit", "--config", "configs/quickstart_teacher.yaml", "--config", "teacher.yaml"]
    assert train.entry_point([*recipe, *student, "--run_dir", "runs/quickstart/teacher"]) == 0
    callbacks = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())["trainer"]["callbacks"]
    settings = {callback["class_path"]: callback.setdefault("init_args", {}) for callback in callbacks}
    settings["GradualPruning"] |= {"multiple": 8, "calibration_batches": 1}
    settings["QuantizationAwareTraining"] |= {"start_step": 5, "observe_steps": 1}
    settings["ExportOnFitEnd"] |= {"benchmark_prompt": 64, "served_questions": 8, "cpu_batches": 2}
    Path("student.yaml").write_text(
        yaml.safe_dump(
            {
                "trainer": {"max_steps": 8, "callbacks": callbacks},
                "model": {"init_args": {"on_policy": {"start": 2, "ramp": 0}, "warmup_steps": 1}},
                "data": {"init_args": data},
            }
        )
    )
    recipe = ["fit", "--config", "configs/quickstart.yaml", "--config", "student.yaml"]
    assert train.entry_point([*recipe, "--run_dir", "runs/quickstart"]) == 0
    run = Path("runs/quickstart")
    report = json.loads((run / "report.json").read_text())
    assert [phase["name"] for phase in report["phases"]] == ["pruned", "recovered", "quantized"]
    assert report["phases"][-1]["parameters"] < report["teacher"]["parameters"]
    assert {check["status"] for check in report["verification"]} == {"passed", "not_run"}
    assert {"student", "compressed", "onnx", "engine", "baseline", "plots", "checkpoints"} <= set(os.listdir(run))
    assert len(list((run / "engine").glob("*.engine"))) == 1
    graphs = ["teacher", "student", "student_cpu"]
    assert [row["name"] for row in report["benchmark"]] == [row["name"] for row in report["served"]] == graphs
    teacher, student, for_cpu = report["served"]
    assert teacher["kl"] < 0.1 * min(student["kl"], for_cpu["kl"])  # in bfloat16 it was asked, in float32 it is served
    assert all(row["questions"] == 8 and row["kl_low"] <= row["kl"] <= row["kl_high"] for row in report["served"])
    last = capsys.readouterr().out.strip().splitlines()
    commands = [
        line.split(":", 2)[-1].split(maxsplit=1)[-1] for line in last if "export.chat" in line or "vllm serve" in line
    ]
    assert commands[0].endswith("-m export.chat runs/quickstart") and commands[1].endswith(
        "serve runs/quickstart/compressed"
    )
    assert chat.main(["runs/quickstart", "--prompt", "Hm?", "--max-new-tokens", "3"]) == 0
    about = {"commit": "0" * 40, "machine": {"cores": 2, "processor": "one"}, "minutes": {"install": None, "all": 1.0}}
    figures = quickstart.figures_of(report, about)
    assert "student, INT8 graph for CPUs" in quickstart.table(figures)


def test_runs_are_numbered_and_their_config_starts_another(place: Path, models: dict[str, str]) -> None:
    for _ in range(2):
        assert train.entry_point(sft(models)) == 0
    assert sorted(os.listdir("runs")) == ["sft-001", "sft-002"]
    before = Path("runs/sft-001/metrics.csv").read_text()
    assert train.entry_point(["fit", "--config", "runs/sft-001/config.yaml"]) == 0
    assert Path("runs/sft-001/metrics.csv").read_text() == before
    assert Path("runs/sft-003/checkpoints/last.ckpt").is_file()
    assert train.entry_point(sft(models, "--run_dir", "runs/sft-001")) == 2


def test_command_line_wins_over_checkpoint_and_differences_are_logged(
    place: Path, models: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    saved = ["--model.init_args.generate_tokens", "5", "--model.init_args.lr_schedule", "constant"]
    assert train.entry_point(sft(models, *saved)) == 0
    last = "runs/sft-001/checkpoints/last.ckpt"
    with caplog.at_level("INFO"):
        cli = train.main(sft(models, "--ckpt_path", last, "--model.init_args.generate_tokens", "7", steps=6))
    assert cli.model.generate_tokens == 7
    assert cli.model.lr_schedule == "constant"  # named by nobody now: the checkpoint's
    assert cli.trainer.global_step == 6
    assert "model.generate_tokens: 5 in the checkpoint, 7 now" in caplog.text
    assert "lr_schedule" not in caplog.text


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_a_checkpoint_is_judged(subcommand: str, place: Path, models: dict[str, str]) -> None:
    assert train.entry_point(sft(models)) == 0
    data = ["--data", "Conversations", "--data.init_args.train", "my.jsonl", "--data.init_args.test", "my.jsonl"]
    arguments = ["--model", "SFT", "--model.init_args.student", models["student"], *data]
    assert train.entry_point([subcommand, *arguments, "--ckpt_path", "runs/sft-001/checkpoints/last.ckpt"]) == 0


MISTAKES = {
    "no model": (["--model.init_args.student", "./nowhere"], "nowhere"),
    "no data": (["--data.init_args.train", "missing.jsonl"], "missing.jsonl"),
    "broken line": (["--data.init_args.train", "broken.jsonl"], "2"),
    "empty data": (["--data.init_args.train", "empty.jsonl"], "empty.jsonl"),
    "unknown family": (["--model.init_args.student", "{unknown}"], "gpt2"),
    "no checkpoint": (["--ckpt_path", "gone.ckpt"], "gone.ckpt"),
    "sparsity": (["--trainer.callbacks+=GradualPruning", "--trainer.callbacks.mlp_sparsity=1.5"], "mlp_sparsity"),
    "no head left": (
        ["--trainer.callbacks+=GradualPruning", "--trainer.callbacks.kv_group_sparsity=0.9",
         "--trainer.callbacks.start_step=1", "--trainer.callbacks.end_step=1"],
        "kv_group_sparsity",
    ),
    "wrong order": (
        ["--trainer.callbacks+=QuantizationAwareTraining", "--trainer.callbacks.start_step=3",
         "--trainer.callbacks+=GradualPruning", "--trainer.callbacks.mlp_sparsity=0.5",
         "--trainer.callbacks.start_step=1", "--trainer.callbacks.end_step=1"],
        "order",
    ),
    "too late": (["--trainer.callbacks+=QuantizationAwareTraining", "--trainer.callbacks.start_step=90"], "max_steps"),
    "fp8 without training for it": (
        ["--trainer.callbacks+=ExportOnFitEnd", "--trainer.callbacks.precision=fp8"], "QuantizationAwareTraining",
    ),
    "fp8 on an old gpu": (
        ["--trainer.callbacks+=ExportOnFitEnd", "--trainer.callbacks.precision=fp8",
         "--trainer.callbacks.compute_capability=[8.6]"],
        "8.9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    name: str, place: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n')
    Path("empty.jsonl").write_text("")
    mistake, named = MISTAKES[name]
    arguments = [part.format(**models) for part in mistake]
    try:
        status = train.entry_point(sft(models, *arguments))
    except SystemExit as stop:  # the parser's own refusal
        status = int(stop.code or 0)
    message = capsys.readouterr().err
    assert status == 2
    assert "expected" in message
    assert "found" in message
    assert named in message
    assert not Path("runs").exists() or os.listdir("runs") == []


def test_other_tokenizers_are_refused(place: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(tiny_folder(place / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = ["--model", "Distillation", "--model.init_args.teacher", str(other), "--model.init_args.student"]
    data = ["--data", "Conversations", "--data.init_args.train", "my.jsonl", "--trainer.max_steps", "1"]
    assert train.entry_point(["fit", *arguments, models["student"], *data]) == 2
    assert "one tokenizer" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    place: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train.models.SFT.training_step

    def step(self: train.models.SFT, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            self.student.model.norm.weight.data.fill_(torch.nan)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(train.models.SFT, "training_step", step)
    assert train.entry_point(sft(models)) == 2
    message = capsys.readouterr().err
    assert "step 2" in message and "nan" in message and "samples [" in message
    checkpoint = torch.load("runs/sft-001/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


class _Terminate(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGTERM)


def test_sigterm_saves_and_stops_and_the_run_goes_on(
    place: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ["--checkpoint.every_n_steps", "100"]
    arguments = sft(models, *extra, "--trainer.callbacks+=tests.test_train._Terminate")
    assert train.entry_point(arguments) == 143
    last = "runs/sft-001/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert train.main(sft(models, "--ckpt_path", last)).trainer.global_step == 4


@pytest.mark.recipe
def test_kill_at_any_moment_leaves_a_checkpoint_that_resumes(place: Path, models: dict[str, str]) -> None:
    arguments = sft(models, "--trainer.log_every_n_steps", "1", steps=100_000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    last = Path("runs/sft-001/checkpoints/last.ckpt")
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(3):  # it saves after every step: the checkpoint is valid whenever we look, also while it is written
        time.sleep(0.37)
        step = torch.load(last, weights_only=True)["global_step"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(last, weights_only=True)["global_step"]
    assert read_metrics(Path("runs/sft-001/metrics.csv"))["train/loss"][-1][0] >= step - 2
    cli = train.main(sft(models, "--ckpt_path", str(last), steps=step + 2))
    assert cli.trainer.global_step == step + 2


def test_help_begins_with_what_one_types(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["fit", "--help"])
    assert stop.value.code == 0
    first = capsys.readouterr().out.splitlines()[:8]
    assert first[0].endswith("fit --config RECIPE.yaml [--config OVERLAY.yaml ...] [--SETTING VALUE ...]")
    assert any("--data.init_args.train my.jsonl" in line for line in first)


def test_a_user_meets_no_stack_of_calls(place: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "fit",
            "--config",
            "configs/sft.yaml",
            "--data.init_args.train",
            "no.jsonl",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: expected")]


def test_one_checkpoint_is_kept(place: Path, models: dict[str, str]) -> None:
    assert train.entry_point(sft(models)) == 0
    assert os.listdir("runs/sft-001/checkpoints") == ["last.ckpt"]
    with pytest.raises(ValueError, match="every_n_steps"):
        Checkpoint(every_n_steps=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "{budget: {cost: parameters, ratio: 1.7}}",
            "expected budget.ratio between 0 and 1 (both excluded), found 1.7",
        ),
        ("{mlp_sparsity: 1.5}", "expected GradualPruning.mlp_sparsity between 0 and 1 (1 excluded), found 1.5"),
    ],
)
def test_a_wrong_setting_of_a_callback_is_one_sentence(
    settings: str, message: str, place: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without what the parser says of the other types that it tried."""
    overlay = place / "pruning.yaml"
    overlay.write_text(f"trainer:\n  callbacks:\n  - class_path: GradualPruning\n    init_args: {settings}\n")
    assert train.entry_point(sft(models, "--config", str(overlay))) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"error: {message}")
    assert "Union" not in found and "Namespace" not in found
