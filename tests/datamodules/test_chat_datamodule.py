"""What all data modules share: truncation counts, evaluation order, calibration batches, ranks, hyperparameters."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.chat_doubles import Words


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_truncation_is_counted_and_reported_once(tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("datamodules.base.rank_zero_info", said.append)
    free = Words(tokenizer_folder)
    full = free.examples("train")
    assert free.truncation["train"] == {"cut": 0, "dropped": 0, "total": 50}
    assert not said

    limit = 45
    data = Words(tokenizer_folder, max_length=limit)
    data.setup("fit")
    data.setup("fit")
    dropped = [e.index for e in full if e.prompt_length >= limit]
    cut = [e.index for e in full if e.prompt_length < limit < len(e)]
    assert dropped
    assert cut
    assert data.truncation["train"] == {"cut": len(cut), "dropped": len(dropped), "total": 50}
    assert [message.split(":")[0] for message in said] == ["train", "val"]
    assert f"of 50 samples, {len(cut)} lost the end of their answer and {len(dropped)} were dropped" in said[0]
    assert [e.index for e in data.examples("train")] == [i for i in range(50) if i not in dropped]
    assert {e.index for e in data.examples("train") if len(e) == limit} >= set(cut)


def test_nothing_fits(tokenizer_folder: str) -> None:
    shortest = min(e.prompt_length for e in Words(tokenizer_folder).examples("train"))
    message = f"fit into max_length 512, max_prompt_length 5 .*none among 50, .* shortest prompt has {shortest} tokens"
    with pytest.raises(ValueError, match=message):
        Words(tokenizer_folder, max_prompt_length=5).setup("fit")


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader", "predict_dataloader"])
def test_evaluation_sees_every_sample_once_shortest_first(tokenizer_folder: str, loader: str) -> None:
    batches = list(getattr(Words(tokenizer_folder, eval_batch_size=6), loader)())
    assert sorted(i for batch in batches for i in batch["index"]) == list(range(20))
    lengths = [n for batch in batches for n in batch["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths)
    assert [len(batch["index"]) for batch in batches] == [6, 6, 6, 2]


def test_loaders_repeat(tokenizer_folder: str) -> None:
    first, second = (list(Words(tokenizer_folder, seed=3).train_dataloader()) for _ in range(2))
    assert len(first) == 7
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    other = list(Words(tokenizer_folder, seed=4).train_dataloader())
    assert [b["index"] for b in other] != [b["index"] for b in first]


def test_bucketing_is_a_switch(tokenizer_folder: str) -> None:
    def padding(bucketing: bool) -> int:
        loader = Words(tokenizer_folder, batch_size=4, length_bucketing=bucketing).train_dataloader()
        return sum(int((1 - batch["attention_mask"]).sum()) for batch in loader)

    assert padding(True) < 0.5 * padding(False)


def test_calibration_batches_repeat_and_leave_loaders_alone(tokenizer_folder: str) -> None:
    data = Words(tokenizer_folder)
    loader = iter(data.train_dataloader())
    seen = [next(loader) for _ in range(3)]
    random_state = torch.get_rng_state()
    drawn = list(data.calibration_batches(4, seed=5))
    assert torch.equal(torch.get_rng_state(), random_state)
    seen += list(loader)

    fresh = Words(tokenizer_folder)
    assert all(same(a, b) for a, b in zip(seen, fresh.train_dataloader(), strict=True))
    assert all(same(a, b) for a, b in zip(drawn, Words(tokenizer_folder).calibration_batches(4, 5), strict=True))
    assert not same(drawn[0], next(data.calibration_batches(1, seed=6)))
    indices = [i for batch in drawn for i in batch["index"]]
    assert len(set(indices)) == len(indices) == 32


def test_calibration_repeats_samples_only_when_all_were_used(tokenizer_folder: str) -> None:
    batches = list(Words(tokenizer_folder).calibration_batches(13, seed=0))  # 104 of 50 samples
    indices = [i for batch in batches for i in batch["index"]]
    assert all(len(batch["index"]) == 8 for batch in batches)
    assert sorted(indices[:50]) == sorted(indices[50:100]) == list(range(50))


def test_ranks_see_different_samples(tokenizer_folder: str) -> None:
    def rank(number: int) -> Any:
        data = Words(tokenizer_folder, batch_size=5)
        progress = SimpleNamespace(epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)))
        data.trainer = SimpleNamespace(
            accumulate_grad_batches=1, num_training_batches=9, world_size=2, global_rank=number, fit_loop=progress
        )  # type: ignore[assignment]
        return [i for batch in data.train_dataloader() for i in batch["index"]]

    assert sorted(rank(0) + rank(1)) == list(range(50))


def test_hyperparameters_are_primitives_and_stay_out_of_the_logger(tokenizer_folder: str) -> None:
    data = Words(tokenizer_folder, batch_size=3, system_prompt="Be brief.")
    assert data.hparams["tokenizer"] == tokenizer_folder
    assert data.hparams["batch_size"] == 3
    assert all(isinstance(value, str | int | bool | None) for value in data.hparams.values())
    assert not data._log_hyperparams


def test_no_score_by_default(tokenizer_folder: str) -> None:
    data = Words(tokenizer_folder)
    batch = next(iter(data.val_dataloader()))
    assert data.score(batch["answers"], batch, "val") is None
    assert data.constant_answer_score("val") is None
