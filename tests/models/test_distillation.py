"""Distillation: what a step of either stage learns from, and what it logs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.collate import Batch, OptimizerStep
from models import Distillation
from models.forward import answer_labels
from models.generation.decoder import FusedDecoder
from models.generation.on_policy import OnPolicy
from models.generation.rollout import rollout_batch
from models.generation.sampling import Sampling
from models.loading.reference import load_model
from models.losses import Objective
from tests.helpers.distilling import KNOWN, OWN, SGD, assert_same_weights, distil, loss_by_hand
from tests.helpers.tiny import tiny_batch, tiny_folder
from tests.helpers.training import loader, tiny_trainer

MIX = Objective(
    {"forward_kl": 1.0, "jsd": 0.5, "total_variation": 0.2, "cross_entropy": 0.7}, temperature=2.0, beta=0.3
)


@pytest.fixture
def build(student_folder: str, teacher_folder: str):
    return partial(distil, student_folder, teacher_folder)


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every generation."""
    rows: list[int] = []
    prefill = FusedDecoder.prefill

    def spying(self: FusedDecoder, prompts_BP: Tensor, *args: Any) -> Tensor:
        rows.append(len(prompts_BP))
        return prefill(self, prompts_BP, *args)

    monkeypatch.setattr(FusedDecoder, "prefill", spying)
    return rows


def cut(batch: Batch, sizes: tuple[int, ...]) -> list[Batch]:
    """Micro-batches of one optimizer step, as the loader hands them out."""
    tokens = len(answer_labels(batch))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [{key: value[end - n : end] for key, value in batch.items()} for n, end in zip(sizes, ends, strict=True)]
    prompts = [{key: part[key] for key in ("prompt_ids", "prompt_mask", "index")} for part in parts]
    return [
        {
            **part,
            "step": OptimizerStep(i, len(parts), tokens, [] if i else prompts),
        }
        for i, part in enumerate(parts)
    ]


def learned(module: Distillation) -> Batch:
    """What the last step learned from: the prompts with the student's own answers."""
    ((prompts, answers),) = module._rolled
    return rollout_batch(prompts, answers)


# Losses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective({"reverse_kl": 1.0}, temperature=2.0),
        Objective({"jsd": 1.0}, beta=0.3, join_ends=True),
        Objective({"skew_forward_kl": 0.5, "skew_reverse_kl": 2.0}, skew=0.2),
        Objective({"top_k_kl": 1.0, "cross_entropy": 0.0}, top_k=9),
        MIX,
    ],
    ids=lambda objective: "+".join(objective.weights),
)
def test_dataset_step(build, teacher_folder: str, tmp_path: Path, batch: Batch, objective: Objective) -> None:
    """One step of plain SGD equals one written by hand, and so do the figures."""
    module = build(optimizer=SGD, lr_schedule="constant", objective=objective)
    model, teacher = load_model(module.student_reference), load_model(teacher_folder)
    trainer = tiny_trainer(tmp_path, steps=1)
    trainer.fit(module, loader([batch]))
    loss, parts = loss_by_hand(model, teacher, batch, objective)
    loss.backward()
    SGD(model.parameters()).step()
    assert_same_weights(module.student, model)
    assert trainer.callback_metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
    logged = {name: float(trainer.callback_metrics[f"train/{name}_dataset"]) for name in objective.weights}
    assert logged == pytest.approx(parts, rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "own", "expected"),
    [
        (MIX, None, {name: weight for name, weight in MIX.weights.items() if name != "cross_entropy"}),
        (Objective({"cross_entropy": 2.0}), None, {"cross_entropy": 2.0}),  # there is nothing else
        (MIX, Objective({"reverse_kl": 1.0, "cross_entropy": 0.5}), {"reverse_kl": 1.0, "cross_entropy": 0.5}),
    ],
)
def test_the_objective_of_own_answers(build, objective: Objective, own: Objective | None, expected: dict) -> None:
    module = build(objective=objective, on_policy_objective=own)
    assert module.objectives["dataset"] == objective
    assert module.objectives["fresh"] == module.objectives["replay"]
    assert module.objectives["fresh"].weights == expected
    assert module.objectives["fresh"].beta == (own or objective).beta


@pytest.mark.parametrize(
    "own", [None, Objective({"reverse_kl": 1.0}), Objective({"policy_gradient": 1.0}, discount=0.9)]
)
def test_on_policy_step(build, teacher_folder: str, tmp_path: Path, own: Objective | None) -> None:
    """It learns from the sampled tokens, by its own objective; the same samples when run again."""
    settings = {"optimizer": SGD, "lr_schedule": "constant", "objective": MIX, "on_policy_objective": own}
    modules = [build(on_policy=OWN, sampling=Sampling(0.8), **settings) for _ in range(2)]
    trainers = [tiny_trainer(tmp_path, steps=1) for _ in modules]
    for module, trainer in zip(modules, trainers, strict=True):
        trainer.fit(module, loader())
    batch = learned(modules[0])
    assert torch.equal(batch["input_ids"], learned(modules[1])["input_ids"])
    assert not torch.equal(answer_labels(batch)[:9], answer_labels(tiny_batch())[:9])
    assert torch.equal(modules[0].student.lm_head.weight, modules[1].student.lm_head.weight)

    model, objective = load_model(modules[0].student_reference), modules[0].objectives["fresh"]
    loss, parts = loss_by_hand(model, load_model(teacher_folder), batch, objective)
    loss.backward()
    SGD(model.parameters()).step()
    assert_same_weights(modules[0].student, model)
    figures = {name: float(value) for name, value in trainers[0].callback_metrics.items()}
    tokens = figures.pop("train/rollout_tokens")
    assert tokens == pytest.approx(len(answer_labels(batch)) / 5) and 1 <= tokens <= 6
    assert figures == pytest.approx(
        {"train/loss": loss.item(), **{f"train/{name}_on_policy": value for name, value in parts.items()}}, rel=1e-3
    )


def test_stages_follow_each_other(build, tmp_path: Path, prefills: list[int]) -> None:
    trainer = tiny_trainer(tmp_path, steps=3)
    trainer.fit(build(on_policy=OnPolicy(start=1, tokens=6)), loader())
    assert prefills == [5, 5]
    assert {"train/loss", "train/forward_kl_dataset", "train/forward_kl_on_policy"} <= set(trainer.logged_metrics)


def test_every_step_samples_anew_from_present_weights(build, tmp_path: Path) -> None:
    """Other random numbers in each step, even from the same weights and prompts."""
    seen = []
    for steps in (1, 2):
        module = build(on_policy=OWN, optimizer=partial(torch.optim.SGD, lr=0.0))
        tiny_trainer(tmp_path, steps=steps).fit(module, loader())
        seen.append(learned(module)["labels"])
    assert not torch.equal(*seen)
    greedy = build(on_policy=OWN, sampling=Sampling(0.0), optimizer=partial(torch.optim.SGD, lr=30.0))
    tiny_trainer(tmp_path, steps=2).fit(greedy, loader())
    unchanged = build(on_policy=OWN, sampling=Sampling(0.0), optimizer=partial(torch.optim.SGD, lr=0.0))
    tiny_trainer(tmp_path, steps=2).fit(unchanged, loader())
    assert not torch.equal(learned(greedy)["labels"], learned(unchanged)["labels"])


# A step's micro-batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "expected"), [(0, [5]), (2, [2, 2, 1])])
def test_one_generation_for_all_micro_batches(
    build, tmp_path: Path, prefills: list[int], batch_size: int, expected: list[int]
) -> None:
    """Or as few as `batch_size` allows, with the same tokens."""

    def answers(sizes: tuple[int, ...], batch_size: int) -> list[list[int]]:
        module = build(on_policy=OnPolicy(start=0, tokens=6, batch_size=batch_size))
        trainer = tiny_trainer(tmp_path, steps=1, accumulate_grad_batches=len(sizes))
        trainer.fit(module, loader(cut(tiny_batch(), sizes)))
        rows = [row for _, answers in module._rolled for row in zip(answers.tokens_BG, answers.mask_BG, strict=True)]
        return [tokens[mask.bool()].tolist() for tokens, mask in rows]

    together = answers((5,), 0)
    prefills.clear()
    assert answers((2, 1, 2), batch_size) == together
    assert prefills == expected


# Hidden states -------------------------------------------------------------------------------------------------------


def test_hidden_states(student_folder: str, tmp_path: Path, batch: Batch) -> None:
    """The mean over layers and tokens of the squared distance of unit vectors, at the positions that predict answers."""
    teacher_folder = tiny_folder(tmp_path / "deep", seed=3, num_hidden_layers=3)
    layers = {0: 2, 1: 0}
    module = distil(
        student_folder,
        teacher_folder,
        optimizer=SGD,
        lr_schedule="constant",
        hidden_state_weight=0.6,
        hidden_state_layers=layers,
    )
    trainer = tiny_trainer(tmp_path, steps=1)
    trainer.fit(module, loader([batch]))

    model, teacher = load_model(student_folder), load_model(teacher_folder)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    seen: dict[str, Tensor] = {}
    for whose, stack in (("ours", model.model), ("theirs", teacher.model)):
        blocks = [*stack.layers[:-1], stack.norm]  # the last layer's output goes through the final norm
        for number, block in enumerate(blocks):
            block.register_forward_hook(lambda _, args, out, name=f"{whose} {number}": seen.update({name: out}))
    model(**inputs)
    with torch.no_grad():
        teacher(**inputs)
    distances = []
    for row, column in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        for ours, theirs in layers.items():
            a, b = seen[f"ours {ours}"][row, column].double(), seen[f"theirs {theirs}"][row, column].double()
            distances.append((a / a.norm() - b / b.norm()).square().sum())
    expected = torch.stack(distances).mean()
    assert trainer.callback_metrics["train/hidden_states"] == pytest.approx(expected.item(), rel=1e-4)
    loss, _ = loss_by_hand(model, teacher, batch, Objective(), KNOWN)
    (loss + 0.6 * expected).backward()
    SGD(model.parameters()).step()
    assert trainer.callback_metrics["train/loss"] == pytest.approx((loss + 0.6 * expected).item(), rel=1e-4)
    assert_same_weights(module.student, model)


@pytest.mark.parametrize("settings", [{"hidden_state_weight": 0.5}, {"hidden_state_layers": {0: 0}}])
def test_hidden_states_need_weight_and_layers(build, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected model.hidden_state_weight and model.hidden_state_layers together"):
        build(**settings)


@pytest.mark.parametrize("layers", [{2: 0}, {0: 5}, {-1: 0}])
def test_hidden_states_of_layers_that_do_not_exist(student_folder: str, tmp_path: Path, layers: dict[int, int]) -> None:
    module = distil(student_folder, student_folder, hidden_state_weight=1.0, hidden_state_layers=layers)
    with pytest.raises(
        ValueError, match="expected decoder layers between 0 and 1, found .*; change model.hidden_state"
    ):
        tiny_trainer(tmp_path, steps=1).fit(module, loader())


def test_hidden_states_of_other_widths_are_refused(build, tmp_path: Path) -> None:
    module = build(hidden_state_weight=1.0, hidden_state_layers={0: 0})
    with pytest.raises(ValueError, match=r"expected hidden states of equal shape, found \(\d+, 32\) .* \(\d+, 40\)"):
        tiny_trainer(tmp_path, steps=1).fit(module, loader())
