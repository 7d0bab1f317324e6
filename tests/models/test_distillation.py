"""Distillation: the schedule of its two stages, its loss, and a teacher that nothing touches."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_doubles import byte_tokenizer
from tiny import tiny_batch, tiny_folder, tiny_model
from torch.nn import functional as F
from training import EDITS, Editing, loader, tiny_trainer

from callbacks import ExportOnFitEnd
from models import Distillation, distillation
from models.forward import Batch, answer_labels, answer_logits
from models.losses import forward_kl, generalized_jsd, reverse_kl
from models.pretrained import load_model
from models.rollout import Rollout
from models.student import load_student_checkpoint


def distil(student: str, teacher: str, **settings: Any) -> Distillation:
    settings = {"optimizer": partial(torch.optim.AdamW, lr=1e-2), "rollout_tokens": 6, "generate_tokens": 0} | settings
    return Distillation(teacher=teacher, student=student, **settings)


@pytest.fixture
def build(student_folder: str, teacher_folder: str):
    return partial(distil, student_folder, teacher_folder)


def digests(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


# Schedule -----------------------------------------------------------------------------------------------------------


def test_probability_is_a_function_of_the_step(build) -> None:
    module = build(on_policy_start=10, on_policy_ramp=4, on_policy_share=0.8)
    values = [module.on_policy_probability(step) for step in (0, 9, 10, 11, 12, 13, 14, 1000)]
    assert values == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    module = build(on_policy_start=3)  # no ramp: all at once
    assert [module.on_policy_probability(step) for step in (2, 3, 4)] == [0, 1, 1]
    assert [build().on_policy_probability(step) for step in (0, 10**6)] == [0, 0]  # no stage 2


def test_the_draw_depends_on_step_and_seed_only(build) -> None:
    def draws(seed: int) -> list[bool]:
        module = build(on_policy_start=0, on_policy_share=0.5, rollout_seed=seed)
        torch.rand(seed + 3)  # the global generator takes no part
        return [module.is_on_policy(step) for step in range(400)]

    first = draws(0)
    assert draws(0) == first
    assert draws(1) != first
    assert 160 < sum(first) < 240
    always, never = build(on_policy_start=0), build(on_policy_start=0, on_policy_share=0.0)
    assert all(always.is_on_policy(step) for step in range(100))
    assert not any(never.is_on_policy(step) for step in range(100))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("on_policy_share", 1.5, "expected model.on_policy_share between 0 and 1, found 1.5"),
        ("on_policy_share", -0.1, "found -0.1"),
        ("beta", 2.0, "expected model.beta between 0 and 1, found 2"),
        ("beta", float("nan"), "found nan"),
        ("loss_temperature", 0.0, "expected model.loss_temperature between 0.001 and 1000, found 0"),
        ("sampling_temperature", -1.0, "expected model.sampling_temperature between 0.001 and 1000, found -1"),
        ("rollout_tokens", 0, "expected model.rollout_tokens between 1 and 1e.06, found 0"),
    ],
)
def test_settings_out_of_range(build, setting: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}; change it in the recipe"):
        build(**{setting: value})


# Loss ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "function"),
    [
        ({}, forward_kl),
        ({"divergence": "reverse_kl", "loss_temperature": 2.0}, partial(reverse_kl, temperature=2.0)),
        ({"divergence": "jsd", "beta": 0.3}, partial(generalized_jsd, beta=0.3)),
    ],
    ids=["forward", "reverse", "jsd"],
)
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_dataset_step(
    student_folder: str, teacher_folder: str, tmp_path: Path, batch: Batch, settings: dict, function: Any, weight: float
) -> None:
    """One step of plain SGD equals one written by hand."""
    sgd = partial(torch.optim.SGD, lr=0.1)
    module = distil(
        student_folder, teacher_folder, optimizer=sgd, lr_schedule="constant", cross_entropy_weight=weight, **settings
    )
    tiny_trainer(tmp_path, steps=1).fit(module, loader([batch]))

    model, teacher = load_model(student_folder), load_model(teacher_folder)
    ours = answer_logits(model, batch)
    loss = function(ours, answer_logits(teacher, batch)).mean() + weight * F.cross_entropy(ours, answer_labels(batch))
    loss.backward()
    sgd(model.parameters()).step()
    for parameter, expected in zip(module.student.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)


def test_on_policy_step_learns_from_its_own_answers(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergence of stage 2, on the sampled tokens, without cross-entropy; the same samples when run again."""
    rollouts: list[Rollout] = []
    real, divergences = distillation.rollout, []

    def spying(*args: Any, **kwargs: Any) -> Rollout:
        assert kwargs["temperature"] == 0.8
        assert kwargs["max_new_tokens"] == 6
        rollouts.append(real(*args, **kwargs))
        return rollouts[-1]

    def recording(name: str, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        divergences.append((name, len(logits)))
        return distillation_divergence(name, logits, *args, **kwargs)

    distillation_divergence = distillation.divergence
    monkeypatch.setattr(distillation, "rollout", spying)
    monkeypatch.setattr(distillation, "divergence", recording)

    def fit() -> Distillation:
        module = build(
            on_policy_divergence="reverse_kl", on_policy_start=1, sampling_temperature=0.8, cross_entropy_weight=100.0
        )
        tiny_trainer(tmp_path, steps=3, logger=False).fit(module, loader())
        return module

    first, again = fit(), fit()
    assert len(rollouts) == 4
    assert [name for name, _ in divergences[:3]] == ["forward_kl", "reverse_kl", "reverse_kl"]
    assert [count for _, count in divergences[1:3]] == [int(r.mask_BG.sum()) for r in rollouts[:2]]
    for one, two in zip(rollouts[:2], rollouts[2:], strict=True):
        assert torch.equal(one.tokens_BG, two.tokens_BG)
    assert torch.equal(first.student.lm_head.weight, again.student.lm_head.weight)


def test_metrics_name_the_source(build, tmp_path: Path) -> None:
    module = build(on_policy_start=1, divergence="jsd", cross_entropy_weight=0.5)
    trainer = tiny_trainer(tmp_path, steps=2)
    trainer.fit(module, loader())
    logged = set(trainer.logged_metrics)
    assert {"train/loss", "train/jsd_dataset", "train/jsd_on_policy", "train/cross_entropy"} <= logged
    assert 1 <= trainer.logged_metrics["train/rollout_tokens"] <= 6


def test_cross_entropy_is_for_gold_answers_only(build, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=1)
    trainer.fit(build(on_policy_start=0, cross_entropy_weight=0.5), loader())
    assert "train/loss" in trainer.logged_metrics
    assert "train/cross_entropy" not in trainer.logged_metrics


def test_every_step_samples_anew(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even from the same weights and prompts."""
    tokens: list[torch.Tensor] = []
    real = distillation.rollout

    def spying(*args: Any, **kwargs: Any) -> Rollout:
        answers = real(*args, **kwargs)
        tokens.append(answers.tokens_BG)
        return answers

    monkeypatch.setattr(distillation, "rollout", spying)
    module = build(on_policy_start=0, optimizer=partial(torch.optim.SGD, lr=0.0))
    tiny_trainer(tmp_path, steps=2).fit(module, loader())
    assert not torch.equal(*tokens)


# The teacher --------------------------------------------------------------------------------------------------------


def test_the_teacher_is_neither_changed_nor_saved(student_folder: str, teacher_folder: str, tmp_path: Path) -> None:
    before = digests(teacher_folder)
    module = distil(student_folder, teacher_folder, on_policy_start=3)
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


def test_checkpoint_loads_in_every_way(student_folder: str, teacher_folder: str, tmp_path: Path, batch: Batch) -> None:
    module = distil(student_folder, teacher_folder, on_policy_start=3, loss_temperature=1.5)
    path = tmp_path / "last.ckpt"
    tiny_trainer(tmp_path, callbacks=[Editing(6, path)]).fit(module, loader())
    loaded = Distillation.load_from_checkpoint(path)
    student, _ = load_student_checkpoint(path)
    with torch.no_grad():
        expected = answer_logits(module.student.eval(), batch)
        assert torch.equal(answer_logits(loaded.student.eval(), batch), expected)
        assert torch.equal(answer_logits(student, batch), expected)
    assert loaded.edits == [edit for step in sorted(EDITS) for edit in EDITS[step]]
    assert (loaded.on_policy_start, loaded.loss_temperature, loaded.teacher_reference) == (3, 1.5, teacher_folder)


def test_different_tokenizers_are_refused(student_folder: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="expected teacher and student to share one tokenizer, found 1 .*'<think>'"):
        distil(student_folder, folder).configure_model()


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(270, 320), (320, 270)])
def test_heads_padded_to_different_sizes(tmp_path: Path, student_vocab: int, teacher_vocab: int, batch: Batch) -> None:
    """Ids that only one of the models has take no part: not in the loss, not in validation, not in samples."""
    student = tiny_folder(tmp_path / "student", vocab_size=student_vocab)
    teacher = tiny_folder(tmp_path / "teacher", vocab_size=teacher_vocab, seed=1)
    module = distil(
        student, teacher, optimizer=partial(torch.optim.SGD, lr=0.1), lr_schedule="constant", sampling_temperature=50.0
    )
    trainer = tiny_trainer(tmp_path, steps=1)
    trainer.fit(module, loader([batch]), loader([batch]))
    assert module.vocabulary == 270
    assert {"val/kl", "val/perplexity", "val/teacher_perplexity"} <= set(trainer.logged_metrics)

    model = load_model(student)
    forward_kl(
        answer_logits(model, batch)[:, :270], answer_logits(load_model(teacher), batch)[:, :270]
    ).mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(module.student.lm_head.weight, model.lm_head.weight, rtol=1e-4, atol=1e-5)

    # At this temperature a head of 320 rows would give every second answer a token that the teacher does not have.
    on_policy = distil(student, teacher, on_policy_start=0, sampling_temperature=50.0)
    tiny_trainer(tmp_path, steps=2).fit(on_policy, loader([batch]))


# Validation ---------------------------------------------------------------------------------------------------------


def test_validation_figures_and_the_teachers_own_once(build, tmp_path: Path, batch: Batch, teacher_folder: str) -> None:
    module, trainer = build(), tiny_trainer(tmp_path)
    (figures,) = trainer.validate(module, loader([batch]), verbose=False)
    assert set(figures) == {"val/perplexity", "val/kl", "val/top1_agreement", "val/teacher_perplexity"}
    with torch.no_grad():
        ours, theirs = answer_logits(tiny_model(), batch), answer_logits(load_model(teacher_folder), batch)
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


def test_half_precision_training_samples_in_bfloat16(build, tmp_path: Path) -> None:
    module = build(on_policy_start=0)
    tiny_trainer(tmp_path, steps=2, precision="bf16-mixed").fit(module, loader())
    assert module._sampler is not None
    assert {p.dtype for p in module._sampler[1].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.teacher.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.student.parameters()} == {torch.float32}
    assert module.stopwatch.seconds.keys() == {"rollout", "teacher"}


# Teacher's numbers --------------------------------------------------------------------------------------------------


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
    losses = {}
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
