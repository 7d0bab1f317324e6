"""Distillation's settings through checkpoints and the command line."""

import contextlib
from pathlib import Path

import pytest
import torch
import yaml

import train
from datamodules.collate import Batch
from models import Distillation
from models.forward import answer_logits
from models.generation.on_policy import OnPolicy
from models.generation.sampling import Sampling
from models.loading.checkpoint import load_student_checkpoint
from models.losses import Objective
from tests.helpers.distilling import distil
from tests.helpers.tiny import tiny_folder, tiny_jsonl
from tests.helpers.training import EDITS, Editing, loader, tiny_trainer

OBJECTIVE = Objective({"jsd": 1.0, "cross_entropy": 0.1}, temperature=1.5, beta=0.2)
OWN = Objective({"reverse_kl": 0.5}, temperature=0.9)
ON_POLICY = OnPolicy(start=3, share=0.7, tokens=5, replay_size=4)


def test_a_module_built_in_python_loads_in_every_way(
    student_folder: str, teacher_folder: str, tmp_path: Path, batch: Batch
) -> None:
    """Its settings are objects; the checkpoint holds plain data, and gives the objects back."""
    module = distil(
        student_folder,
        teacher_folder,
        objective=OBJECTIVE,
        on_policy_objective=OWN,
        on_policy=ON_POLICY,
        sampling=Sampling(0.8, top_k=9),
    )
    path = tmp_path / "last.ckpt"
    tiny_trainer(tmp_path, callbacks=[Editing(6, path)]).fit(module, loader())
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved["objective"]["weights"] == {"jsd": 1.0, "cross_entropy": 0.1}
    assert saved["on_policy"]["tokens"] == 5

    loaded = Distillation.load_from_checkpoint(path)
    assert loaded.objectives == {"dataset": OBJECTIVE, "fresh": OWN, "replay": OWN}
    assert (loaded.own_answers.settings, loaded.own_answers.sampling) == (ON_POLICY, Sampling(0.8, top_k=9))
    assert loaded.edits == [edit for step in sorted(EDITS) for edit in EDITS[step]]
    assert len(loaded.own_answers.replay) == len(module.own_answers.replay) == 4
    student, _ = load_student_checkpoint(path)
    with torch.no_grad():
        expected = answer_logits(module.student.eval(), batch)
        assert torch.equal(answer_logits(loaded.student.eval(), batch), expected)
        assert torch.equal(answer_logits(student, batch), expected)


def test_defaults_survive_a_checkpoint(student_folder: str, teacher_folder: str, tmp_path: Path) -> None:
    module = distil(student_folder, teacher_folder)
    trainer = tiny_trainer(tmp_path, steps=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Distillation.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.objectives == module.objectives
    assert loaded.own_answers.settings == OnPolicy()


# The command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A recipe of two steps, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "student", seed=1)
    tiny_folder(tmp_path / "teacher", seed=2)
    tiny_jsonl(tmp_path / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(9)])
    settings = {
        "name": "distil",
        "trainer": {"max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False},
        "model": {
            "class_path": "Distillation",
            "init_args": {
                "student": "student",
                "teacher": "teacher",
                "generate_tokens": 0,
                "objective": {"weights": {"forward_kl": 1.0, "cross_entropy": 0.1}, "temperature": 2.0},
                "on_policy": {"start": 1, "ramp": 2, "tokens": 9},
                "sampling": {"temperature": 0.9},
                "hidden_state_weight": 0.1,
                "hidden_state_layers": {0: 1},
            },
        },
        "data": {
            "class_path": "Conversations",
            "init_args": {"train": "my.jsonl", "batch_size": 2, "val_fraction": 0},
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return ["fit", "--config", "recipe.yaml"]


def test_dotted_overrides_leave_their_neighbours(recipe: list[str]) -> None:
    cli = train.main(
        [
            *recipe,
            "--model.init_args.on_policy.tokens=5",
            "--model.init_args.objective.beta=0.25",
            "--model.init_args.sampling.top_k=7",
            "--model.init_args.on_policy_objective.weights",
            "{reverse_kl: 1.0}",
        ]
    )
    module = cli.model
    assert module.own_answers.settings == OnPolicy(start=1, ramp=2, tokens=5)
    assert module.own_answers.sampling == Sampling(0.9, top_k=7)
    assert module.objectives["dataset"] == Objective({"forward_kl": 1.0, "cross_entropy": 0.1}, 2.0, beta=0.25)
    assert module.objectives["fresh"] == Objective({"reverse_kl": 1.0})
    assert module.hidden_state_layers == {0: 1}


def test_a_checkpoint_of_the_command_line_goes_on(recipe: list[str]) -> None:
    """Its settings are the defaults of the next run; the command line's win, one by one."""
    assert train.entry_point([*recipe, "--model.init_args.on_policy.tokens=5"]) == 0
    path = "runs/distil-001/checkpoints/last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 2
    loaded = Distillation.load_from_checkpoint(path)
    assert loaded.own_answers.settings == OnPolicy(start=1, ramp=2, tokens=5)
    bare = ["--model", "Distillation", "--model.init_args.student", "student", "--model.init_args.teacher", "teacher"]
    data = ["--data", "Conversations", "--data.init_args.train", "my.jsonl", "--data.init_args.batch_size", "2"]
    more = ["--trainer.max_steps=4", "--data.init_args.val_fraction=0", "--model.init_args.on_policy.share=0.5"]
    cli = train.main(["fit", *bare, *data, *more, "--ckpt_path", path])
    assert cli.trainer.global_step == 4
    assert cli.model.own_answers.settings == OnPolicy(start=1, ramp=2, tokens=5, share=0.5)
    assert cli.model.objectives["dataset"] == Objective({"forward_kl": 1.0, "cross_entropy": 0.1}, 2.0)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (["--model.init_args.objective.weights", "{forward_lk: 1.0}"], "found 'forward_lk'"),
        (["--model.init_args.on_policy.share", "1.5"], "expected on_policy.share between 0 and 1, found 1.5"),
        (
            ["--model.init_args.sampling.temperature", "-1"],
            "expected sampling.temperature between 0 and 1,000, found -1",
        ),
        (["--model.init_args.objective.beta", "2"], "expected objective.beta between 0 and 1, found 2"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    recipe: list[str], override: list[str], sentence: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with contextlib.suppress(SystemExit):  # of the parser
        assert train.entry_point([*recipe, *override]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/*")), "nothing is written"
