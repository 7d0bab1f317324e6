"""Steps are whole: a run that was killed or stopped, at any micro-batch and more than once, ends as the uninterrupted one."""

import errno
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

import callbacks.checkpoint as checkpoints
from callbacks import Checkpoint, PhaseEvaluation
from datamodules import Conversations
from models import SFT, Distillation, StudentModule
from models.generation.on_policy import OnPolicy
from tests.helpers.same import assert_same
from tests.helpers.tiny import sums

ACCUMULATE, STEPS = 4, 5
Moment = Callable[[Trainer, int], bool]


class Killed(BaseException):
    """As SIGKILL, as far as a test can: nothing is saved any more."""


class At(Callback):
    """Does something once, before a micro-batch: `moment(trainer, micro_batches_of_this_process)` says when."""

    def __init__(self, moment: Moment, action: Callable[[], None]) -> None:
        self.moment, self.action, self.count, self.done = moment, action, 0, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.done and self.moment(trainer, self.count):
            self.done = True
            self.action()
        self.count += 1


def kill() -> None:
    raise Killed


class AtTheEnd(Callback):
    """Killed after the last step, before anything is done about it."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise Killed


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return sums(tmp_path_factory.mktemp("places"), 60)


def fit(
    places: dict[str, str],
    folder: Path,
    *others: Callback,
    ckpt_path: Path | None = None,
    on_policy: OnPolicy | None = None,
    val_check_interval: int | None = None,
    every_n_steps: int = 1,
    steps: int = STEPS,
) -> Trainer:
    """A run of five steps of four micro-batches; distils if it may answer for itself."""
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    module: StudentModule = SFT(student=places["student"], optimizer=optimizer, generate_tokens=0)
    if on_policy is not None:
        module = Distillation(
            student=places["student"],
            teacher=places["teacher"],
            optimizer=optimizer,
            generate_tokens=0,
            on_policy=on_policy,
        )
    data = Conversations(tokenizer=places["student"], train=places["data"], batch_size=2, val_fraction=0.1, seed=3)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=ACCUMULATE,
        precision="32-true",
        default_root_dir=folder,
        callbacks=[*others, Checkpoint(every_n_steps=every_n_steps)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if val_check_interval else 0,
        val_check_interval=val_check_interval,
        check_val_every_n_epoch=None if val_check_interval else 1,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def killed(places: dict[str, str], folder: Path, *others: Callback, **settings: Any) -> Path:
    """The checkpoint that a run leaves behind which is killed."""
    with pytest.raises(Killed):
        fit(places, folder, *others, **settings)
    return folder / "checkpoints/last.ckpt"


def state(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but where it was written."""
    checkpoint = torch.load(path, weights_only=True)
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "edits")
    return {key: checkpoint[key] for key in keys} | {"on_policy": checkpoint.get("on_policy")}


def after(step: int, micro_batches: int) -> Moment:
    """So many micro-batches into the step after `step`; in a resumed run, of those that it does itself."""
    seen: list[int] = []

    def moment(trainer: Trainer, count: int) -> bool:
        if trainer.global_step == step:
            seen.append(count)
        return len(seen) == micro_batches + 1

    return moment


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("second", [1, 3])
def test_two_kills_in_one_step_lose_no_gradient(
    first: int, second: int, places: dict[str, str], tmp_path: Path
) -> None:
    """A resumed run used to save after its first micro-batch, at the same step, without the gradients."""
    expected = fit(places, tmp_path / "whole")
    last = killed(places, tmp_path / "one", At(after(2, first), kill))
    assert torch.load(last, weights_only=True)["global_step"] == 2
    again = killed(places, tmp_path / "two", At(after(2, second), kill), ckpt_path=last)
    assert not again.exists()  # nothing new to save yet: the next resume goes on from the first run's
    found = fit(places, tmp_path / "three", ckpt_path=last)
    assert found.global_step == expected.global_step
    assert_same(state(tmp_path / "three/checkpoints/last.ckpt"), state(tmp_path / "whole/checkpoints/last.ckpt"))


ADAPTIVE = OnPolicy(start=0, adaptive=0.4, tolerance=-math.inf, tokens=4)  # every validation but the first adds 0.4


def test_what_a_validation_changes_is_in_the_checkpoint_of_its_step(places: dict[str, str], tmp_path: Path) -> None:
    every_step = {"on_policy": ADAPTIVE, "val_check_interval": ACCUMULATE}
    fit(places, tmp_path / "whole", **every_step)
    for step in (2, 3):
        last = killed(places, tmp_path / f"killed{step}", At(after(step, 1), kill), **every_step)
        share = torch.load(last, weights_only=True)["on_policy"][0]["adaptive_share"]
        assert share == pytest.approx(0.4 * (step - 1))
        fit(places, tmp_path / f"resumed{step}", ckpt_path=last, **every_step)
        assert_same(
            state(tmp_path / f"resumed{step}/checkpoints/last.ckpt"), state(tmp_path / "whole/checkpoints/last.ckpt")
        )


class Sources(Callback):
    """Where the answers of each micro-batch came from, by optimizer step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[str]] = {}
        self._step = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault(self._step, []).append(pl_module._source)


def test_a_validation_in_the_middle_of_a_step_changes_the_next_step_only(
    places: dict[str, str], tmp_path: Path
) -> None:
    """The second micro-batch would look for answers that nobody has sampled."""
    sources = Sources()
    at_once = OnPolicy(start=0, adaptive=1.0, tolerance=-math.inf, tokens=4)
    fit(places, tmp_path, sources, on_policy=at_once, val_check_interval=3)
    assert all(len(set(of_step)) == 1 and len(of_step) == ACCUMULATE for of_step in sources.seen.values())
    assert sources.seen[1][0] == "dataset"  # drawn before the second validation, after micro-batch 6
    assert sources.seen[2][0] == "fresh"


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals do what they do at a terminal, also where the tests run in the background or under nohup."""
    handlers = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_request_to_stop_saves_between_steps(
    number: signal.Signals, micro_batches: int, places: dict[str, str], tmp_path: Path
) -> None:
    expected = fit(places, tmp_path / "whole")
    before = {request: signal.getsignal(request) for request in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    request = At(after(2, micro_batches), partial(signal.raise_signal, number))
    with pytest.raises(SystemExit) as stop:
        fit(places, tmp_path / "stopped", request, every_n_steps=100)
    assert stop.value.code == 128 + number
    assert {request: signal.getsignal(request) for request in before} == before
    last = tmp_path / "stopped/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    found = fit(places, tmp_path / "resumed", ckpt_path=last)
    assert found.global_step == expected.global_step
    assert_same(state(tmp_path / "resumed/checkpoints/last.ckpt"), state(tmp_path / "whole/checkpoints/last.ckpt"))


class InValidation(Callback):
    """Asked to stop while it validates after step 3."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 3:
            signal.raise_signal(signal.SIGTERM)


def test_a_request_during_a_validation_is_kept_for_the_next_step(places: dict[str, str], tmp_path: Path) -> None:
    every_step = {"on_policy": ADAPTIVE, "val_check_interval": ACCUMULATE}
    fit(places, tmp_path / "whole", **every_step)
    with pytest.raises(SystemExit) as stop:
        fit(places, tmp_path / "stopped", InValidation(), every_n_steps=100, **every_step)
    assert stop.value.code == 143
    last = tmp_path / "stopped/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    fit(places, tmp_path / "resumed", ckpt_path=last, **every_step)
    assert_same(state(tmp_path / "resumed/checkpoints/last.ckpt"), state(tmp_path / "whole/checkpoints/last.ckpt"))


def test_a_second_request_stops_at_once(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "_SAME_REQUEST", -1.0)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit) as stop:
        fit(places, tmp_path, At(after(2, 1), twice), every_n_steps=100)
    assert isinstance(stop.value.__context__, KeyboardInterrupt)
    assert "asked again, it stops at once" in capfd.readouterr().err
    assert not (tmp_path / "checkpoints/last.ckpt").exists()


def test_a_signal_that_is_ignored_stays_so(places: dict[str, str], tmp_path: Path) -> None:
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = fit(places, tmp_path, At(after(2, 1), partial(signal.raise_signal, signal.SIGHUP)))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.global_step == STEPS


def phases_of(path: Path) -> Sequence[dict[str, Any]]:
    return torch.load(path, weights_only=True)["callbacks"]["PhaseEvaluation"]["phases"]


def test_a_run_that_was_killed_after_its_last_step_is_judged_and_saved(places: dict[str, str], tmp_path: Path) -> None:
    def judge() -> PhaseEvaluation:
        return PhaseEvaluation(generate_tokens=0, split="val")

    fit(places, tmp_path / "whole", judge())
    last = killed(places, tmp_path / "killed", AtTheEnd(), judge())
    assert torch.load(last, weights_only=True)["global_step"] == STEPS
    assert phases_of(last) == []
    fit(places, tmp_path / "resumed", judge(), ckpt_path=last)
    resumed = tmp_path / "resumed/checkpoints/last.ckpt"
    assert phases_of(resumed) == phases_of(tmp_path / "whole/checkpoints/last.ckpt") != []
    assert_same(state(resumed), state(tmp_path / "whole/checkpoints/last.ckpt"))


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saves = torch.save, []

    def fill(checkpoint: Any, file: Any) -> None:
        saves.append(1)
        if len(saves) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(ValueError, match="expected room on the disk of .*checkpoints', found it full; .* start again"):
        fit(places, tmp_path)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]
