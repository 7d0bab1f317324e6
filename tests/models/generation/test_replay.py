"""The replay buffer, alone and through a crash."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from datamodules import Conversations
from models import Distillation
from models.generation.on_policy import OnPolicy
from models.generation.replay import ReplayBuffer
from models.generation.rollout import Rollout
from tests.helpers.rollouts import texts
from tests.helpers.tiny import tiny_folder, tiny_jsonl

STEPS = 12


def samples(*numbers: int) -> tuple[dict[str, Any], Rollout]:
    """Sample n: a prompt of n % 3 + 1 tokens 10 n, and an answer of n % 4 + 1 tokens 10 n + 1, padded with 7s."""
    prompts, answers = torch.full((2, len(numbers), 5), 7), torch.full((len(numbers), 6), 7)
    prompts[1] = 0
    for row, n in enumerate(numbers):
        prompts[0, row, 4 - n % 3 :], prompts[1, row, 4 - n % 3 :] = 10 * n, 1
        answers[row, : n % 4 + 1] = 10 * n + 1
    batch = {"prompt_ids": prompts[0], "prompt_mask": prompts[1], "index": list(numbers)}
    return batch, Rollout(answers, [n % 4 + 1 for n in numbers])


def draw(buffer: ReplayBuffer, count: int, seed: int = 0) -> tuple[dict[str, Any], Rollout]:
    return buffer.draw(count, torch.Generator().manual_seed(seed), torch.device("cpu"))


def test_the_oldest_leave_first() -> None:
    buffer = ReplayBuffer(4)
    assert (len(buffer), buffer.is_full) == (0, False)
    buffer.add(*samples(0, 1, 2))
    assert (len(buffer), buffer.is_full) == (3, False)
    buffer.add(*samples(3, 4, 5))
    assert (len(buffer), buffer.is_full) == (4, True)
    assert sorted(draw(buffer, 4)[0]["index"]) == [2, 3, 4, 5]
    buffer.add(*samples(*range(10, 20)))
    assert sorted(draw(buffer, 4)[0]["index"]) == [16, 17, 18, 19]


def test_drawn_samples_are_those_that_were_kept() -> None:
    """Padding of the batch they came with is gone; theirs is on the left of prompts and on the right of answers."""
    buffer = ReplayBuffer(9)
    buffer.add(*samples(*range(9)))
    batch, answers = draw(buffer, 5)
    assert len(set(batch["index"])) == 5
    for row, n in enumerate(batch["index"]):
        length, width = n % 3 + 1, batch["prompt_ids"].shape[1]
        assert batch["prompt_ids"][row].tolist() == [0] * (width - length) + [10 * n] * length
        assert batch["prompt_mask"][row].tolist() == [0] * (width - length) + [1] * length
        assert texts(answers)[row] == [10 * n + 1] * (n % 4 + 1)
        assert answers.mask_BG[row].tolist() == sorted(answers.mask_BG[row].tolist(), reverse=True)
    assert batch["prompt_ids"].shape[1] == max(n % 3 + 1 for n in batch["index"])
    assert answers.tokens_BG.shape[1] == max(n % 4 + 1 for n in batch["index"])


def test_more_than_there_are_come_twice() -> None:
    buffer = ReplayBuffer(3)
    buffer.add(*samples(0, 1, 2))
    assert sorted(draw(buffer, 6)[0]["index"]) == [0, 0, 1, 1, 2, 2]


def test_draws_are_even_and_survive_a_round_trip(tmp_path: Path) -> None:
    buffer, other = ReplayBuffer(5), ReplayBuffer(5)
    buffer.add(*samples(*range(7)))
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    counts = dict.fromkeys(range(2, 7), 0)
    for seed in range(400):
        (batch, answers), (their_batch, theirs) = draw(buffer, 2, seed), draw(other, 2, seed)
        assert batch["index"] == their_batch["index"]
        assert torch.equal(batch["prompt_ids"], their_batch["prompt_ids"])
        assert torch.equal(answers.tokens_BG, theirs.tokens_BG) and torch.equal(answers.mask_BG, theirs.mask_BG)
        for index in batch["index"]:
            counts[index] += 1
    assert all(120 < count < 200 for count in counts.values())
    other.add(*samples(9))
    assert len(buffer) == 5 and 9 not in draw(buffer, 5)[0]["index"], "the states do not share their list"


# Through a crash -----------------------------------------------------------------------------------------------------


class Losses(Callback):
    """What every step learned from and its loss; saves and crashes after given steps."""

    def __init__(self, path: Path, save_at: tuple[int, ...] = (), crash_at: int = 0) -> None:
        self.path, self.save_at, self.crash_at = path, save_at, crash_at
        self.seen: dict[int, list[float]] = {}
        self.sources: dict[int, str] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step
        self.sources[self.step] = pl_module.own_answers.source(self.step, STEPS)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.setdefault(self.step, []).append(float(outputs["loss"]))
        if trainer.global_step in self.save_at and trainer.global_step != self.step:
            trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")
        if self.crash_at and trainer.global_step == self.crash_at:
            raise RuntimeError("crash")


def fit(place: Path, folder: Path, ckpt_path: Path | None = None, **record: Any) -> tuple[Any, Losses]:
    module = Distillation(
        student=str(place / "student"),
        teacher=str(place / "teacher"),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        generate_tokens=0,
        on_policy=OnPolicy(start=1, share=0.9, tokens=5, replay_size=6),
    )
    data = Conversations(
        tokenizer=str(place / "student"), train=str(place / "data.jsonl"), batch_size=2, val_fraction=0
    )
    losses = Losses(folder, **record)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=2,
        default_root_dir=folder,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if losses.crash_at:
        with pytest.raises(RuntimeError, match="crash"):
            trainer.fit(module, data)
    else:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, losses


def test_a_crash_and_a_resume_equal_the_uninterrupted_run(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "student", seed=1)
    tiny_folder(tmp_path / "teacher", seed=2)
    tiny_jsonl(tmp_path / "data.jsonl", [(f"{n} plus {n}?", "is " * (n % 4) + str(2 * n)) for n in range(15)])
    module, losses = fit(tmp_path, tmp_path)
    assert {*losses.sources.values()} == {"dataset", "fresh", "replay"}
    replayed = [step for step, source in losses.sources.items() if source == "replay"]
    crash_at = (2, replayed[0], replayed[-1])
    for step in crash_at:
        folder = tmp_path / f"crash {step}"
        folder.mkdir()
        fit(tmp_path, folder, save_at=(step,), crash_at=step)
        checkpoint = torch.load(folder / f"{step}.ckpt", weights_only=True)
        assert len(checkpoint["on_policy"][0]["replay"]) == (6 if step > 2 else 4)
        resumed, theirs = fit(tmp_path, folder, folder / f"{step}.ckpt")
        assert theirs.seen == {s: value for s, value in losses.seen.items() if s >= step}
        assert theirs.sources == {s: value for s, value in losses.sources.items() if s >= step}
        for name, tensor in module.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor)
