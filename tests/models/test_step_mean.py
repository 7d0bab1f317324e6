"""One optimizer step on 16 samples is the same step however it is cut: 1 x 16, 4 x 4, or 2 ranks x 2 x 4."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from datamodules.collate import IGNORE_INDEX, Batch, OptimizerStep
from models import SFT, Distillation
from models.forward import answer_labels, answer_logits
from models.generation.on_policy import OnPolicy
from models.loading.reference import load_model
from models.step_mean import step_of
from tests.helpers.ranks import ended_well, start
from tests.helpers.step_mean_runs import CUTS, KINDS, fit
from tests.helpers.tiny import tiny_batch, tiny_folder, tiny_jsonl
from tests.helpers.training import loader, tiny_trainer

# Answers of 1 to 61 letters: a mean of means would weigh the letters of short answers far more.
PAIRS = [(f"question {n}", "ab" * (n * n % 31) + "c") for n in range(16)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step_mean")
    tiny_folder(folder / "student", seed=1)
    tiny_folder(folder / "teacher", seed=2)
    tiny_jsonl(folder / "data.jsonl", PAIRS)
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, dict[str, Any]]:
    """By kind of training, then by cut; the two ranks are started as a process that starts the other."""
    process = start(["-m", "tests.helpers.step_mean_runs", str(place)], place)
    single = {kind: {cut: fit(place, kind, cut) for cut in CUTS if CUTS[cut][0] == 1} for kind in KINDS}
    ended_well(process)
    ranks = [torch.load(place / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    return {
        kind: {**single[kind], "2 ranks x 2 x 4": ranks[0][kind], "the other rank": ranks[1][kind]} for kind in KINDS
    }


@pytest.mark.parametrize("cut", ["4 x 4", "2 ranks x 2 x 4", "the other rank"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_does_not_depend_on_the_cut(kind: str, cut: str, runs: dict[str, dict[str, Any]]) -> None:
    expected, update = runs[kind]["1 x 16"]["update"], runs[kind][cut]["update"]
    assert expected.norm() > 1
    assert float((update - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_logged_is_the_mean_of_the_step(kind: str, runs: dict[str, dict[str, Any]]) -> None:
    """Every figure, on one rank and on two; and the loss is what the micro-batches' shares add up to."""
    whole = runs[kind]["1 x 16"]
    assert whole["logged"]["train/loss"] == pytest.approx(whole["losses"][0])
    names = {name for name in whole["logged"] if name.startswith("train/")} - {"train/rollout_tokens"}
    assert len(names) == {"sft": 1, "dataset": 5, "on policy": 4}[kind]  # without cross-entropy on the latter
    for cut in ("4 x 4", "2 ranks x 2 x 4", "the other rank"):
        for name in names:
            assert runs[kind][cut]["logged"][name] == pytest.approx(whole["logged"][name], rel=1e-5), (cut, name)
    assert sum(runs[kind]["4 x 4"]["losses"]) == pytest.approx(whole["logged"]["train/loss"], rel=1e-5)


def test_the_same_step_by_hand_and_a_mean_of_means_fails(place: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Cross-entropy over all answer tokens of the 16 samples at once; a mean over four batches' means is far off."""
    batches = [tiny_batch(PAIRS[start : start + 4]) for start in range(0, 16, 4)]
    updates = {}
    for name in ("tokens", "means"):
        model = load_model(str(place / "student"))
        losses = [F.cross_entropy(answer_logits(model, b), answer_labels(b), reduction="none") for b in batches]
        loss = torch.cat(losses).mean() if name == "tokens" else torch.stack([part.mean() for part in losses]).mean()
        loss.backward()
        updates[name] = -10.0 * torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    ours = runs["sft"]["4 x 4"]["update"]
    assert float((ours - updates["tokens"]).norm() / ours.norm()) < 1e-5
    assert float((ours - updates["means"]).norm() / ours.norm()) > 0.05
    counts = runs["sft"]["4 x 4"]["answer_tokens"]
    assert max(counts) > 1.5 * min(counts)
    by_rank = [runs["sft"][cut]["answer_tokens"] for cut in ("2 ranks x 2 x 4", "the other rank")]
    assert sum(map(sum, by_rank)) == sum(counts) == sum(len(answer) + 1 for _, answer in PAIRS)
    assert sum(by_rank[0]) != sum(by_rank[1])


# Without answers -----------------------------------------------------------------------------------------------------


def without_answers(batch: Batch) -> Batch:
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}


@pytest.mark.parametrize("kind", ["sft", "dataset"])
def test_a_micro_batch_without_answers_changes_nothing(place: Path, tmp_path: Path, kind: str) -> None:
    """Alone in its step it leaves the weights; beside another it leaves that one's update (N is 0, not NaN)."""

    def update(batches: list[Batch], accumulate: int) -> torch.Tensor:
        settings = {"student": str(place / "student"), "lr_schedule": "constant", "generate_tokens": 0}
        settings["optimizer"] = partial(torch.optim.SGD, lr=0.5)
        module = SFT(**settings) if kind == "sft" else Distillation(str(place / "teacher"), **KINDS[kind], **settings)
        tokens = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
        told = []
        for position, batch in enumerate(batches):
            prompts = [{key: b[key] for key in ("prompt_ids", "prompt_mask", "index")} for b in batches]
            first = prompts if position == 0 else []
            step = OptimizerStep(position, len(batches), tokens, first)
            told.append({**batch, "step": step})
        trainer = tiny_trainer(tmp_path, steps=1, accumulate_grad_batches=accumulate)
        trainer.fit(module, loader(told))
        assert torch.isfinite(trainer.callback_metrics["train/loss"])
        weights = zip(module.student.parameters(), load_model(str(place / "student")).parameters(), strict=True)
        return torch.cat([(ours.detach() - theirs).flatten() for ours, theirs in weights])

    assert not update([without_answers(tiny_batch())], 1).any()
    alone = update([tiny_batch()], 1)
    assert alone.any()
    for batches in ([tiny_batch(), without_answers(tiny_batch())], [without_answers(tiny_batch()), tiny_batch()]):
        torch.testing.assert_close(update(batches, 2), alone, rtol=1e-5, atol=1e-6)


# What the loader must say --------------------------------------------------------------------------------------------


def test_a_plain_loader_is_enough_without_accumulation(batch: Batch) -> None:
    step = step_of(batch, 1)
    assert (step.position, step.size, int(step.answer_tokens)) == (0, 1, len(answer_labels(batch)))
    assert step.batches == [batch] and step.begins and step.ends


@pytest.mark.parametrize("on_policy", [OnPolicy(), OnPolicy(start=0)])
def test_accumulation_needs_a_loader_that_knows_the_step(place: Path, tmp_path: Path, on_policy: OnPolicy) -> None:
    settings = {"student": str(place / "student"), "generate_tokens": 0}
    modules = [SFT(**settings), Distillation(str(place / "teacher"), on_policy=on_policy, **settings)]
    for module in modules:
        message = "expected batches from a ChatDataModule when gradients accumulate over 3 micro-batches, found .*; use"
        with pytest.raises(ValueError, match=message):
            tiny_trainer(tmp_path, steps=1, accumulate_grad_batches=3).fit(module, loader([tiny_batch()] * 3))
