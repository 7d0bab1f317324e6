"""Resuming after any batch, of any epoch, continues with the batches an uninterrupted run would have seen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from datamodules.collate import Batch
from tests.helpers.chat_doubles import Words

NUM_BATCHES, NUM_EPOCHS = 4, 3  # 50 samples in batches of 14: three full ones and one of 8


class Recorder(LightningModule):
    """One number to train; remembers which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append((batch_idx, batch["index"]))
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch["index"])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        return batch["prompts"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def words(tokenizer_folder: str, **kwargs: Any) -> Words:
    return Words(tokenizer_folder, batch_size=14, seed=1, **kwargs)


def trainer(folder: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    options: dict[str, Any] = {"max_epochs": NUM_EPOCHS, "val_check_interval": 2, "num_sanity_val_steps": 0, **kwargs}
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **options,
    )


def save_always(folder: Path) -> list[Callback]:
    """After every optimizer step and at the end of every epoch."""
    options: dict[str, Any] = {"save_top_k": -1, "auto_insert_metric_name": False}
    return [
        ModelCheckpoint(folder, "step{step}", every_n_train_steps=1, **options),
        ModelCheckpoint(folder, "epoch{epoch}", save_on_train_epoch_end=True, **options),
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_seen", range(NUM_BATCHES))
def test_loader_alone(tokenizer_folder: str, num_workers: int, num_seen: int) -> None:
    loader = words(tokenizer_folder, num_workers=num_workers).train_dataloader()
    loader.sampler.set_epoch(2)
    batches = iter(loader)
    for _ in range(num_seen):
        next(batches)
    state = loader.state_dict()
    rest = [batch["index"] for batch in batches]

    resumed = words(tokenizer_folder, num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(state)
    assert [batch["index"] for batch in resumed] == rest
    assert len(rest) == NUM_BATCHES - num_seen


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("at_end", [False, True])  # before or after the loader said that it was the last batch
def test_state_after_the_last_batch_begins_the_next_epoch(
    tokenizer_folder: str, num_workers: int, at_end: bool
) -> None:
    loader = words(tokenizer_folder, num_workers=num_workers).train_dataloader()
    batches = iter(loader)
    for _ in range(NUM_BATCHES):
        next(batches)
    if at_end:
        assert next(batches, None) is None
    resumed = words(tokenizer_folder, num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert [i for batch in resumed for i in batch["index"]] == resumed.sampler.order(1)


def test_other_number_of_workers_is_refused(tokenizer_folder: str) -> None:
    state = words(tokenizer_folder).train_dataloader().state_dict()
    with pytest.raises(ValueError, match="expected num_workers 0 as in the run that saved the checkpoint, found 1"):
        words(tokenizer_folder, num_workers=1).train_dataloader().load_state_dict(state)


@pytest.fixture(scope="module")
def uninterrupted(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """A whole run that saved a checkpoint after every batch and at the end of every epoch."""
    folder = tmp_path_factory.mktemp("run")
    module = Recorder()
    trainer(folder, *save_always(folder)).fit(module, datamodule=words(tokenizer_folder))
    return folder, module


def test_uninterrupted_run_covers_every_epoch_in_another_order(uninterrupted: tuple[Path, Recorder]) -> None:
    _, module = uninterrupted
    epochs = [module.seen[i * NUM_BATCHES : (i + 1) * NUM_BATCHES] for i in range(NUM_EPOCHS)]
    orders = [[i for _, batch in epoch for i in batch] for epoch in epochs]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == NUM_EPOCHS


CHECKPOINTS = [
    *[(f"step{n}", n) for n in range(1, NUM_BATCHES * NUM_EPOCHS)],
    *[(f"epoch{n}", (n + 1) * NUM_BATCHES) for n in range(NUM_EPOCHS - 1)],
]


@pytest.mark.parametrize(("checkpoint", "num_seen"), CHECKPOINTS)
def test_resumed_fit(
    uninterrupted: tuple[Path, Recorder], tokenizer_folder: str, checkpoint: str, num_seen: int
) -> None:
    folder, whole = uninterrupted
    resumed = Recorder()
    trainer(folder).fit(resumed, datamodule=words(tokenizer_folder), ckpt_path=folder / f"{checkpoint}.ckpt")
    assert resumed.seen == whole.seen[num_seen:]


@pytest.mark.parametrize(
    ("num_workers", "per_epoch", "options"),
    [
        (1, NUM_BATCHES, {}),
        (0, NUM_BATCHES, {"check_val_every_n_epoch": None, "val_check_interval": 3}),
        (0, 2, {"limit_train_batches": 2}),
    ],
    ids=["worker process", "validation across epochs", "part of every epoch"],
)
def test_resumed_fit_in_other_circumstances(
    tokenizer_folder: str, tmp_path: Path, num_workers: int, per_epoch: int, options: dict[str, Any]
) -> None:
    whole = Recorder()
    data = words(tokenizer_folder, num_workers=num_workers)
    trainer(tmp_path, *save_always(tmp_path), **options).fit(whole, datamodule=data)
    assert len(whole.seen) == per_epoch * NUM_EPOCHS
    for checkpoint, num_seen in [(f"step{per_epoch + n}", per_epoch + n) for n in range(per_epoch + 1)] + [
        ("epoch1", 2 * per_epoch)
    ]:
        resumed = Recorder()
        trainer(tmp_path, **options).fit(
            resumed,
            datamodule=words(tokenizer_folder, num_workers=num_workers),
            ckpt_path=tmp_path / f"{checkpoint}.ckpt",
        )
        assert resumed.seen == whole.seen[num_seen:], checkpoint


def test_checkpoint_holds_primitives_only(uninterrupted: tuple[Path, Recorder], tokenizer_folder: str) -> None:
    folder, _ = uninterrupted
    checkpoint = torch.load(folder / "step6.ckpt", weights_only=True)
    assert checkpoint["datamodule_hyper_parameters"]["tokenizer"] == tokenizer_folder
    loaded = Words.load_from_checkpoint(folder / "step6.ckpt")
    assert (loaded.batch_size, loaded.seed) == (14, 1)


def test_accumulated_gradients(tokenizer_folder: str, tmp_path: Path) -> None:
    """A checkpoint after an optimizer step of two batches."""
    whole, resumed = Recorder(), Recorder()
    trainer(tmp_path, *save_always(tmp_path), accumulate_grad_batches=2).fit(whole, datamodule=words(tokenizer_folder))
    trainer(tmp_path, accumulate_grad_batches=2).fit(
        resumed, datamodule=words(tokenizer_folder), ckpt_path=tmp_path / "step3.ckpt"
    )
    assert resumed.seen == whole.seen[6:]


def test_fit_without_validation_data(tokenizer_folder: str, tmp_path: Path) -> None:
    class TrainOnly(Words):
        def has_split(self, split: str) -> bool:
            return split != "val"

    module = Recorder()
    trainer(tmp_path, max_epochs=1, val_check_interval=1.0).fit(module, datamodule=TrainOnly(tokenizer_folder))
    assert len(module.seen) == 7
    assert not module.validated


def test_predict_gives_every_test_prompt(tokenizer_folder: str, tmp_path: Path) -> None:
    data = Words(tokenizer_folder)
    predicted = trainer(tmp_path).predict(Recorder(), datamodule=data)
    assert predicted is not None
    prompts = [prompt for batch in predicted for prompt in batch]
    assert sorted(prompts) == sorted(c.prompt[0]["content"] for c in data.conversations("test"))


def test_overfit_batches(tokenizer_folder: str, tmp_path: Path) -> None:
    """Lightning rebuilds the loader with its own sampler for this."""
    module = Recorder()
    trainer(tmp_path, overfit_batches=2, max_epochs=2, val_check_interval=1.0).fit(
        module, datamodule=words(tokenizer_folder)
    )
    assert [indices for _, indices in module.seen] == 2 * [list(range(14)), list(range(14, 28))]
