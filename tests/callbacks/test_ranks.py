"""Two processes on the CPU (gloo): they end with the same student, whatever happened to it on the way."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy

from callbacks.shared.distributed import check_strategy, share_of_rank
from models.quantization import scale_from_amax
from tests.helpers.ranks import run, start, wait
from tests.helpers.same import assert_same
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_folder, tiny_jsonl

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny_folder(folder / "student", seed=1)
    tiny_folder(folder / "teacher", seed=2)
    tiny_jsonl(folder / "data.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(34)])
    return folder


@pytest.fixture(scope="module")
def ranks(place: Path) -> list[dict[str, Any]]:
    """What each rank wrote down, by run."""
    run(["-m", "tests.helpers.two_ranks", str(place)], place)
    return [torch.load(place / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_ranks_have_the_same_student_after_every_step(ranks: list[dict[str, Any]]) -> None:
    """Also where a rank would have cut elsewhere or repaired otherwise, and although each saw other samples."""
    first, second = (rank["whole"] for rank in ranks)
    assert sorted(first["weights"]) == list(range(11))  # 0: the first micro-batch
    assert_same(first["weights"], second["weights"])
    assert_same(first["state"], second["state"])
    assert_same(first["edits"], second["edits"])
    assert_same(first["optimizer"], second["optimizer"])
    for step, samples in first["samples"].items():
        assert not {i for batch in samples for i in batch} & {i for batch in second["samples"][step] for i in batch}
    assert not torch.equal(first["weights"][9], first["weights"][10])


def test_the_student_shrank_twice_and_is_quantized(ranks: list[dict[str, Any]]) -> None:
    whole = ranks[0]["whole"]
    sizes = [len(whole["weights"][step]) for step in range(1, 11)]
    assert len({*sizes}) == 3
    assert sizes == sorted(sizes, reverse=True)
    assert whole["state"]["student.model.layers.1.mlp.up_proj.weight"].shape == (24, 32)
    assert whole["state"]["student.model.layers.1.self_attn.k_proj.weight"].shape == (8, 32)
    ops = [edit["op"] for edit in whole["edits"]]
    assert sorted(ops) == ["fake_quantize"] + ["narrow_kv_groups"] * 2 + ["narrow_mlp"] * 4
    assert whole["frozen"] == [True] * 14


def test_scales_cover_what_all_ranks_have_seen(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["whole"]["largest"] for rank in ranks)
    assert len(first) == 14
    assert any(first[name] > second[name] for name in first)
    assert any(first[name] < second[name] for name in first)
    for name in first:
        expected = scale_from_amax(torch.tensor(max(first[name], second[name])))
        for rank in ranks:
            assert torch.equal(rank["whole"]["state"][f"student.{name}.input_quantizer.scale"], expected)


@pytest.mark.parametrize("moment", ["between", "observing"])
def test_a_resume_equals_the_uninterrupted_run(moment: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for part in ("state", "edits", "optimizer", "frozen", "pruning"):
            assert_same(rank[moment][part], rank["whole"][part])
        steps = rank[moment]["weights"].keys() - {3, 6}  # where the resumed run's first micro-batch is noted
        assert len(steps) >= 4
        assert all(torch.equal(rank[moment]["weights"][step], rank["whole"]["weights"][step]) for step in steps)


def test_ranks_learn_the_same_scales(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["learning"] for rank in ranks)
    assert first["edits"][-1] == {"op": "learn_scales", "weights_follow": False}
    for step in range(1, 11):  # of the weights, and of what is learned beside them
        assert torch.equal(first["weights"][step], second["weights"][step])
    assert_same(first["state"], second["state"])
    assert_same(first["optimizer"], second["optimizer"])
    names = [name for name in first["state"] if name.endswith("quantizer.scale")]
    assert len(names) == 28
    moved = [not torch.equal(first["state"][name], ranks[0]["whole"]["state"][name]) for name in names]
    assert sum(moved) > 14
    for rank in ranks:
        for part in ("state", "edits", "optimizer"):
            assert_same(rank["learning, resumed"][part], rank["learning"][part])


def test_events_are_measured_together(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["whole"]["pruning"] for rank in ranks)
    assert first == second
    assert [event["step"] for event in first] == [2, 4]
    assert all(event["kl_after_repair"] > 0 and "kl_recovered" in event for event in first)


def test_phases_are_judged_together(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["whole"] for rank in ranks)
    assert first["phases"] == second["phases"]
    assert [(phase["name"], phase["step"]) for phase in first["phases"]] == [
        ("pruned", 4),
        ("recovered", 5),
        ("quantized", 10),
    ]
    assert first["num_val_batches"] % 2, "ranks with shares of the same size"
    last = first["phases"][-1]
    assert {key: last[key] for key in first["whole"]} == pytest.approx(first["whole"])
    assert first["teacher"]["kl"] == 0


@pytest.mark.parametrize(("count", "world"), [(5, 2), (4, 2), (1, 2), (3, 1), (2, 3), (0, 2)])
def test_shares_weigh_every_batch_the_same(count: int, world: int) -> None:
    trainers: Any = [SimpleNamespace(world_size=world, global_rank=rank) for rank in range(world)]
    shares = [list(share_of_rank(trainer, iter(range(count)), count)) for trainer in trainers]
    assert count == 0 or all(shares)
    everything = sorted(i for share in shares for i in share)
    assert everything == sorted(list(range(count)) * (world if count < world else 1))


def test_strategies_that_cannot_shrink_are_refused() -> None:
    def trainer(strategy: Any) -> Any:
        return SimpleNamespace(strategy=strategy)

    check_strategy(trainer(SingleDeviceStrategy()))
    check_strategy(trainer(DDPStrategy()))
    with pytest.raises(ValueError, match="found FSDPStrategy; set trainer.strategy to ddp, or change it in a run of"):
        check_strategy(trainer(FSDPStrategy()))
    with pytest.raises(ValueError, match="processes started by fork; set trainer.strategy to ddp"):
        check_strategy(trainer(DDPStrategy(start_method="fork")))


@pytest.mark.recipe
def test_a_recipe_runs_to_its_report_on_two_devices(place: Path) -> None:
    """The command line, with everything that one rank does alone: samples, checkpoints, export, report."""
    recipe = {
        "name": "pair",
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 6,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "callbacks": [
                {
                    "class_path": "GradualPruning",
                    "init_args": {
                        "mlp_sparsity": 0.5,
                        "start_step": 2,
                        "end_step": 2,
                        "multiple": 8,
                        "calibration_batches": 1,
                    },
                },
                {"class_path": "PhaseEvaluation", "init_args": {"generate_tokens": 3, "split": "val"}},
                {"class_path": "QuantizationAwareTraining", "init_args": {"start_step": 3, "observe_steps": 1}},
                {"class_path": "Throughput", "init_args": {"every_n_steps": 2}},
                {"class_path": "SampleCompletions", "init_args": {"num_samples": 2, "max_new_tokens": 3}},
                {"class_path": "ExportOnFitEnd", "init_args": {"precision": "fp32", "formats": ["hf"]}},
            ],
        },
        "model": {
            "class_path": "Distillation",
            "init_args": {
                "student": "student",
                "teacher": "teacher",
                "on_policy": {"start": 1, "tokens": 4},
                "generate_tokens": 3,
            },
        },
        "data": {
            "class_path": "Conversations",
            "init_args": {"train": "data.jsonl", "val_fraction": 0.2, "batch_size": 2, "score_exact_match": True},
        },
        "checkpoint": {"every_n_steps": 2},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["fit", "--config", "recipe.yaml", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    output = run([str(ROOT / "train.py"), *arguments], place)
    assert os.listdir(place / "runs") == ["pair-001"], output
    folder = place / "runs/pair-001"
    report = json.loads((folder / "report.json").read_text())
    assert [phase["name"] for phase in report["phases"]] == ["pruned", "recovered", "quantized"]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 3, 6, 6]
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert checkpoint["state_dict"]["student.model.layers.0.mlp.up_proj.weight"].shape == (24, 32)
    assert "sync_dist" not in output


@pytest.mark.recipe
def test_ranks_that_are_asked_to_stop_save_and_end(place: Path) -> None:
    """SIGTERM to both at once, as a scheduler sends it, in the middle of training."""
    settings = {
        "trainer.max_steps": 100_000,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "model": "SFT",
        "model.init_args.student": "student",
        "data": "Conversations",
        "data.init_args.train": "data.jsonl",
        "data.init_args.val_fraction": 0,
        "run_dir": "stopped",
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    process = start([str(ROOT / "train.py"), "fit", *arguments], place)
    deadline = time.monotonic() + 120
    while not (place / "stopped/config.yaml").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    output = wait(process, 120)
    checkpoint = place / "stopped/checkpoints/last.ckpt"
    assert checkpoint.exists(), output[-5000:]
    assert 0 < torch.load(checkpoint, weights_only=True)["global_step"] < 100_000
