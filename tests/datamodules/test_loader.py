"""Micro-batches know their optimizer step: whatever the accumulation, the limit of an epoch, and where a run resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.collate import IGNORE_INDEX, Batch
from tests.datamodules.test_exact_resume import Recorder, save_always, trainer, words


class StepRecorder(Recorder):
    """Remembers what each micro-batch says about its step, and at which optimizer step it was used."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        self.steps.append(
            {**batch["step"]._asdict(), "index": batch["index"], "tokens": tokens, "at": self.global_step}
        )
        return super().training_step(batch, batch_idx)


def record(folder: Path, tokenizer: str, *callbacks: Any, **settings: Any) -> StepRecorder:
    module = StepRecorder()
    ckpt_path = settings.pop("ckpt_path", None)
    run = trainer(folder, *callbacks, **{"max_epochs": 2, "val_check_interval": None, **settings})
    run.fit(module, datamodule=words(tokenizer), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("limit", [1.0, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 9])
def test_the_steps_are_those_of_the_trainer(
    tokenizer_folder: str, tmp_path: Path, accumulate: int, limit: float
) -> None:
    module = record(tmp_path, tokenizer_folder, accumulate_grad_batches=accumulate, limit_train_batches=limit)
    assert len(module.steps) == 2 * (4 if limit == 1.0 else 3)
    for at in {step["at"] for step in module.steps}:
        fellows = [step for step in module.steps if step["at"] == at]
        assert [step["position"] for step in fellows] == list(range(len(fellows)))
        assert {step["size"] for step in fellows} == {len(fellows)}
        assert {step["answer_tokens"] for step in fellows} == {sum(step["tokens"] for step in fellows)}
        assert [prompts["index"] for prompts in fellows[0]["batches"]] == [step["index"] for step in fellows]
        assert all(not step["batches"] for step in fellows[1:])


def test_accumulation_does_not_change_the_order(tokenizer_folder: str, tmp_path: Path) -> None:
    runs = [record(tmp_path, tokenizer_folder, accumulate_grad_batches=n).seen for n in (1, 3)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("limit", [1.0, 3])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_resuming_at_any_optimizer_step(tokenizer_folder: str, tmp_path: Path, accumulate: int, limit: float) -> None:
    settings = {"accumulate_grad_batches": accumulate, "limit_train_batches": limit}
    whole = record(tmp_path, tokenizer_folder, *save_always(tmp_path), **settings)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) > 3
    for path in checkpoints:
        done = torch.load(path, weights_only=True)["global_step"]
        resumed = record(tmp_path / "resumed", tokenizer_folder, ckpt_path=path, **settings)
        expected = [(s["at"], s["position"], s["size"], s["index"]) for s in whole.steps if s["at"] >= done]
        assert [(s["at"], s["position"], s["size"], s["index"]) for s in resumed.steps] == expected


def test_a_state_from_the_middle_of_a_step_goes_on_in_that_step(tokenizer_folder: str) -> None:
    """Saved by time, for example: the gradients are lost, but the trainer's count of micro-batches is not."""

    def loader() -> Any:
        data = words(tokenizer_folder)
        data.setup("fit")
        ready = data.train_dataloader()
        ready.accumulate = lambda: 3
        return ready

    first = loader()
    batches = iter(first)
    seen = [next(batches) for _ in range(2)]
    state = first.state_dict()
    rest = list(batches)
    second = loader()
    second.load_state_dict(state)
    resumed = list(second)
    assert [b["index"] for b in resumed] == [b["index"] for b in rest]
    assert [b["step"].position for b in resumed] == [b["step"].position for b in rest] == [2, 0]
    assert resumed[0]["step"].answer_tokens == seen[0]["step"].answer_tokens
    assert [b["index"] for b in resumed[0]["step"].batches] == [b["index"] for b in [*seen, rest[0]]]


def test_evaluation_has_no_steps(tokenizer_folder: str) -> None:
    data = words(tokenizer_folder)
    data.setup("fit")
    assert all("step" not in batch for batch in data.val_dataloader())
