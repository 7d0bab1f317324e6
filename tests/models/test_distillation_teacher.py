"""Distillation's teacher: nothing touches it, it shares a tokenizer but not the size of its head, and it is judged once."""

import hashlib
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from callbacks import ExportOnFitEnd
from datamodules.collate import Batch
from models import distillation
from models.forward import answer_labels, answer_logits
from models.generation.decoder import Decoder, decoder_for
from models.generation.on_policy import OnPolicy
from models.generation.sampling import Sampling
from models.loading.reference import load_model
from models.losses import Objective, forward_kl
from tests.helpers.chat_doubles import byte_tokenizer
from tests.helpers.distilling import KNOWN, OWN, SGD, assert_same_weights, distil, loss_by_hand
from tests.helpers.tiny import tiny_batch, tiny_folder, tiny_model
from tests.helpers.training import Editing, loader, tiny_trainer


@pytest.fixture
def build(student_folder: str, teacher_folder: str):
    return partial(distil, student_folder, teacher_folder)


def digests(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def test_the_teacher_is_neither_changed_nor_saved(build, teacher_folder: str, tmp_path: Path) -> None:
    before = digests(teacher_folder)
    module = build(on_policy=OnPolicy(start=3, tokens=6))
    path = tmp_path / "last.ckpt"
    tiny_trainer(tmp_path, callbacks=[Editing(6, path)]).fit(module, loader(), loader())

    fresh = load_model(teacher_folder).state_dict()
    teacher = module.teacher.model.state_dict()
    assert teacher.keys() == fresh.keys()
    assert all(torch.equal(teacher[name], fresh[name]) for name in fresh)
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.model.parameters())
    assert not module.teacher.model.training
    assert digests(teacher_folder) == before

    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"student.{name}" for name in module.student.state_dict()}
    shapes = {tuple(tensor.shape) for tensor in checkpoint["state_dict"].values()}
    assert not any(40 in shape for shape in shapes)  # the teacher's width
    trained = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.student.parameters()}


# Vocabulary ---------------------------------------------------------------------------------------------------------


def test_different_tokenizers_are_refused(student_folder: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="expected teacher and student to share one tokenizer, found 1 .*'<think>'"):
        distil(student_folder, folder).configure_model()


@pytest.mark.parametrize("objective", [Objective(), Objective({"reverse_kl": 1.0, "cross_entropy": 0.5})])
@pytest.mark.parametrize(("ours", "theirs"), [(270, 320), (320, 270), (300, 300)])
def test_only_the_tokenizers_tokens_take_part(
    tmp_path: Path, ours: int, theirs: int, objective: Objective, batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads padded to any sizes: the rest is in no loss, no validation and no sample."""
    student = tiny_folder(tmp_path / "student", vocab_size=ours)
    teacher = tiny_folder(tmp_path / "teacher", vocab_size=theirs, seed=1)
    module = distil(student, teacher, optimizer=SGD, lr_schedule="constant", objective=objective)
    trainer = tiny_trainer(tmp_path, steps=1)
    with caplog.at_level("INFO"):
        trainer.fit(module, loader([batch]), loader([batch]))
    message = f"the heads' rows (student {ours}, teacher {theirs}), the tokenizer's {KNOWN} tokens take part"
    assert caplog.text.count(message) == 1
    assert module.vocabulary == KNOWN

    model, their_model = load_model(student), load_model(teacher)
    loss, _ = loss_by_hand(model, their_model, batch, objective)
    loss.backward()
    SGD(model.parameters()).step()
    assert_same_weights(module.student, model)
    with torch.no_grad():
        pair = [answer_logits(m, batch)[:, :KNOWN] for m in (model, their_model)]
    figures = trainer.callback_metrics
    assert figures["val/kl"] == pytest.approx(forward_kl(*pair).mean().item(), rel=1e-4)
    for name, logits in zip(("val/perplexity", "val/teacher_perplexity"), pair, strict=True):
        assert figures[name] == pytest.approx(F.cross_entropy(logits, answer_labels(batch)).exp().item(), rel=1e-4)

    # At this temperature a head of 270 rows would give nearly every batch a token that nobody knows.
    own = distil(student, teacher, on_policy=OnPolicy(start=0, tokens=40), sampling=Sampling(50.0))
    own.configure_model()
    with torch.no_grad():
        own.student.generation_config.eos_token_id = own.student.config.eos_token_id = 259
    tiny_trainer(tmp_path, steps=1).fit(own, loader([batch]))
    ((_, answers),) = own._rolled
    assert answers.mask_BG.sum() > 100
    assert 200 < answers.tokens_BG.max() < KNOWN


def test_nothing_is_said_about_heads_that_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_folder(tmp_path, vocab_size=KNOWN)
    with caplog.at_level("INFO"):
        distil(folder, folder).configure_model()
    assert "take part" not in caplog.text


# Validation ---------------------------------------------------------------------------------------------------------


def test_validation_figures_and_the_teachers_own_once(build, tmp_path: Path, batch: Batch, teacher_folder: str) -> None:
    module, trainer = build(), tiny_trainer(tmp_path)
    (figures,) = trainer.validate(module, loader([batch]), verbose=False)
    assert set(figures) == {"val/perplexity", "val/kl", "val/top1_agreement", "val/teacher_perplexity"}
    with torch.no_grad():
        ours, theirs = (answer_logits(m, batch)[:, :KNOWN] for m in (tiny_model(), load_model(teacher_folder)))
    assert figures["val/kl"] == pytest.approx(forward_kl(ours, theirs).mean().item(), rel=1e-4)
    expected = F.cross_entropy(theirs, answer_labels(batch)).exp().item()
    assert figures["val/teacher_perplexity"] == pytest.approx(expected, rel=1e-4)

    (again,) = trainer.validate(module, loader([tiny_batch()]), verbose=False)
    assert "val/teacher_perplexity" not in again
    assert again["val/kl"] == pytest.approx(figures["val/kl"])


def test_a_student_that_is_its_teacher(student_folder: str, tmp_path: Path) -> None:
    (figures,) = tiny_trainer(tmp_path).validate(distil(student_folder, student_folder), loader(), verbose=False)
    assert figures["val/kl"] == pytest.approx(0, abs=1e-6)
    assert figures["val/top1_agreement"] == 1


def test_validation_moves_the_adaptive_share(build, tmp_path: Path) -> None:
    """A student that gets worse: the share rises by one notch a validation, after the first."""
    own = OnPolicy(start=0, tokens=4, adaptive=0.2, tolerance=0.0)
    module = build(on_policy=own, optimizer=partial(torch.optim.SGD, lr=0.05, maximize=True), lr_schedule="constant")
    tiny_trainer(tmp_path, steps=3, check_val_every_n_epoch=1).fit(module, loader(), loader())
    assert module.own_answers.adaptive_share == pytest.approx(0.4)


# Teacher's numbers --------------------------------------------------------------------------------------------------


def test_half_precision_training_samples_in_bfloat16(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[torch.dtype] = []

    def spying(model: torch.nn.Module, dtype: torch.dtype) -> Decoder:
        dtypes.append(dtype)
        return decoder_for(model, dtype)

    monkeypatch.setattr(distillation, "decoder_for", spying)
    module = build(on_policy=OWN)
    tiny_trainer(tmp_path, steps=2, precision="bf16-mixed").fit(module, loader())
    assert dtypes == [torch.bfloat16] * 2
    assert {p.dtype for p in module.teacher.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.student.parameters()} == {torch.float32}
    assert module.stopwatch.seconds.keys() == {"rollout", "teacher"}


@pytest.mark.parametrize(
    ("teacher_dtype", "precision", "expected"),
    [
        ("auto", "32-true", torch.float32),
        ("auto", "bf16-mixed", torch.bfloat16),
        ("bfloat16", "32-true", torch.bfloat16),
    ],
)
def test_the_teachers_type_follows_training_or_the_setting(
    teacher_dtype: str, precision: str, expected: torch.dtype, build, tmp_path: Path
) -> None:
    module = build(teacher_dtype=teacher_dtype)
    tiny_trainer(tmp_path, steps=1, precision=precision).fit(module, loader())
    assert {p.dtype for p in module.teacher.model.parameters()} == {expected}


def test_a_teacher_in_8_bits_teaches_and_is_not_exported(build, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    losses: dict[str, float] = {}
    for teacher_dtype in ("auto", "int8"):
        module = build(teacher_dtype=teacher_dtype)
        trainer = tiny_trainer(tmp_path, steps=1)
        trainer.fit(module, loader(), loader())
        losses[teacher_dtype] = float(trainer.callback_metrics["train/loss"])
    assert losses["int8"] == pytest.approx(losses["auto"], rel=0.05)
    assert losses["int8"] != losses["auto"]
    with pytest.raises(
        ValueError, match="expected a teacher in floating point for ExportOnFitEnd.compare_with_teacher"
    ):
        ExportOnFitEnd(formats=["hf"], compare_with_teacher=True).setup(trainer, module, "fit")
