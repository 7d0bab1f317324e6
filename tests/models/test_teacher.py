"""The frozen teacher: asked, never changed, never part of another module."""

from pathlib import Path

import pytest
import torch
from torch import nn

from datamodules.collate import Batch
from models.forward import answer_hidden, answer_lengths, answer_logits
from models.loading.reference import load_model
from models.losses import forward_kl
from models.teacher import RememberingTeacher, Teacher
from tests.helpers.tiny import tiny_folder


@pytest.fixture
def teacher(teacher_folder: str) -> Teacher:
    return Teacher(teacher_folder, dtype=torch.float32)


def test_answers_like_the_model_it_is(teacher: Teacher, teacher_folder: str, batch: Batch) -> None:
    model = load_model(teacher_folder)
    assert torch.equal(teacher.answer_logits(batch), answer_logits(model, batch))
    assert torch.equal(teacher.answer_hidden(batch), answer_hidden(model, batch))


@pytest.mark.parametrize(
    ("family", "settings"), [("granite", {"logits_scaling": 8.0}), ("gemma2", {"final_logit_softcapping": 3.0})]
)
def test_logits_are_those_of_the_whole_model(family: str, settings: dict, tmp_path: Path, batch: Batch) -> None:
    """With the scale or the cap that a family puts behind its head."""
    teacher = Teacher(tiny_folder(tmp_path, family, **settings), dtype=torch.float32)
    labels_BT = batch["labels"][:, 1:]
    with torch.no_grad():
        logits_BTV = teacher.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    torch.testing.assert_close(teacher.answer_logits(batch), logits_BTV[labels_BT != -100])


def test_is_frozen(teacher: Teacher, batch: Batch) -> None:
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training
    assert not teacher.answer_logits(batch).requires_grad


def test_is_no_part_of_a_module_that_holds_it(teacher: Teacher) -> None:
    holder = nn.Linear(2, 2)
    holder.teacher = teacher  # type: ignore[assignment]
    holder.train()
    assert set(holder.state_dict()) == {"weight", "bias"}
    assert len(list(holder.parameters())) == 2
    assert not teacher.model.training


def test_dtype_is_its_own(teacher_folder: str, batch: Batch) -> None:
    """Autocast of the student's training does not reach it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Teacher(teacher_folder, dtype=torch.float32).answer_logits(batch).dtype == torch.float32
    assert Teacher(teacher_folder, dtype=torch.bfloat16).answer_logits(batch).dtype == torch.bfloat16


def test_to_returns_itself(teacher: Teacher) -> None:
    assert teacher.to(torch.device("cpu")) is teacher


def test_remembering_teacher_runs_its_body_once_a_sample(teacher: Teacher, batch: Batch) -> None:
    runs: list[int] = []
    teacher.model.base_model.register_forward_pre_hook(lambda *_: runs.append(1))
    remembering, other = RememberingTeacher(teacher), {**batch, "index": [7, 8, 9, 10, 11]}
    first = [remembering.answer_logits(b) for b in (batch, other)]
    again = [remembering.answer_logits(b) for b in (batch, other)]
    assert len(runs) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], teacher.answer_logits(batch))


def test_remembered_samples_come_in_any_order_and_company(teacher: Teacher, batch: Batch) -> None:
    memory: dict[int, torch.Tensor] = {}
    exact_ND = teacher.answer_hidden(batch)
    RememberingTeacher(teacher, memory).answer_hidden(batch)
    parts = exact_ND.split(answer_lengths(batch))
    assert len({len(part) for part in parts}) > 1
    turned = {**batch, "index": batch["index"][::-1]}
    teacher.model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("asked again"))
    assert torch.equal(RememberingTeacher(teacher, memory).answer_hidden(turned), torch.cat(parts[::-1]))


def test_int8_keeps_the_head_and_nearly_the_answers(teacher: Teacher, teacher_folder: str, batch: Batch) -> None:
    pytest.importorskip("torchao")
    small = Teacher(teacher_folder, dtype=torch.float32, int8=True)
    head = small.model.get_output_embeddings().weight
    assert torch.equal(head, teacher.model.get_output_embeddings().weight)
    assert head is small.model.get_input_embeddings().weight
    assert not any(parameter.requires_grad for parameter in small.model.parameters())
    for (name, ours), theirs in zip(small.model.named_modules(), teacher.model.modules(), strict=True):
        if isinstance(ours, nn.Linear) and ours.weight is not head:
            assert ours.weight.qdata.dtype == torch.int8, name
            # Half a step of each row's grid, up to rounding.
            step = theirs.weight.abs().amax(1, keepdim=True) / 127
            assert ((ours.weight.dequantize() - theirs.weight).abs() <= 0.51 * step).all(), name
    kl = forward_kl(small.answer_logits(batch), teacher.answer_logits(batch)).mean()
    assert 0 < kl < 0.02
