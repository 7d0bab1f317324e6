"""The captured teacher says what the live one says, and nothing about samples it does not know."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.forward import answer_hidden, answer_labels
from models.generation.rollout import Rollout, rollout_batch
from models.loading.reference import load_model
from models.losses.chunked import FullTargets, TopKTargets, linear_objective
from models.losses.objective import Objective
from models.losses.output_head import Head, head_of
from models.offline import is_offline, open_offline_teacher
from models.offline.forms import bytes_per_token, decode_top_k, encode_top_k, top_k_layout
from models.teacher import Teacher
from tests.helpers.chat_doubles import CHATML, Words, byte_tokenizer
from tests.helpers.tiny import tiny_folder

Captured = Callable[..., Path]


@pytest.fixture
def live(teacher_folder: str) -> Teacher:
    return Teacher(teacher_folder, dtype=torch.float32)


def epochs(data: Words, count: int) -> Iterator[Batch]:
    for _ in range(count):
        yield from data.train_dataloader()


def trained_losses(
    student: PreTrainedModel, batches: Iterator[Batch], loss_of: Callable[[PreTrainedModel, Batch], Tensor]
) -> list[float]:
    student = copy.deepcopy(student).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(student, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    "objective", [{"forward_kl": 1.0}, {"reverse_kl": 0.7, "cross_entropy": 0.3}, {"jsd": 1.0}], ids=str
)
def test_training_equals_that_of_a_live_teacher_rounded_to_bfloat16(
    objective: dict[str, float], captured: Captured, data: Words, teacher_folder: str, student_folder: str
) -> None:
    # In float64, because the batches of training are not those of the capture: in float32 a matrix product's last bits depend on
    # the batch, also for a live teacher, and can tip a number to bfloat16's next value (see the next test for equal batches).
    live = Teacher(teacher_folder, dtype=torch.float64)
    offline = open_offline_teacher(captured(dtype=torch.float64), data)

    def loss_with(targets_of: Callable[[Batch], FullTargets]) -> Callable[[PreTrainedModel, Batch], Tensor]:
        def loss(student: PreTrainedModel, batch: Batch) -> Tensor:
            labels_N, targets = answer_labels(batch), targets_of(batch)
            targets = FullTargets(targets.hidden_NE.float(), targets.head.cut(None, torch.float32))
            hidden_ND, head = answer_hidden(student, batch), head_of(student)
            return linear_objective(hidden_ND, head, targets, labels_N, Objective(objective))[0] / len(labels_N)

        return loss

    def rounded(batch: Batch) -> FullTargets:
        return FullTargets(live.answer_hidden(batch).bfloat16(), head_of(live.model))

    student = load_model(student_folder)
    found = trained_losses(student, epochs(data, 2), loss_with(offline.targets))
    expected = trained_losses(student, epochs(data, 2), loss_with(rounded))
    assert len(found) == 14 and found[-1] < found[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_same_batches_nothing_but_the_rounding_is_lost(
    dtype: torch.dtype, captured: Captured, data: Words, teacher_folder: str
) -> None:
    data.eval_batch_size = 6
    live = Teacher(teacher_folder, dtype=dtype)
    offline = open_offline_teacher(captured(dtype=dtype, batch_size=6, shard_tokens=10_000), data)
    for batch in data.val_dataloader():  # by length, as within a shard
        expected_NE, found_NE = live.answer_hidden(batch), offline.answer_hidden(batch, "val")
        assert found_NE.dtype == dtype and torch.equal(found_NE, expected_NE.bfloat16().to(dtype))
        expected_NV = live.model.get_output_embeddings()(expected_NE.bfloat16().to(dtype))
        assert torch.equal(offline.answer_logits(batch, "val"), expected_NV)


def test_the_compact_form_holds_the_teachers_most_probable_tokens(
    captured: Captured, data: Words, live: Teacher
) -> None:
    offline = open_offline_teacher(captured(form="top_k", top_k=9), data)
    assert offline.vocabulary == 260, "tokens that the tokenizer lacks take no part"
    for batch in data.train_dataloader():
        log_p_NV = live.answer_logits(batch)[:, :260].log_softmax(-1)
        expected_NK, tokens_NK = log_p_NV.topk(9)
        targets = offline.targets(batch)
        assert isinstance(targets, TopKTargets)
        assert (
            targets.tokens_NK == tokens_NK
        ).float().mean() > 0.99  # two tokens may be equally probable but for rounding
        torch.testing.assert_close(targets.log_probabilities_NK, expected_NK, rtol=1e-3, atol=1e-3)
        tail_N = 1 - targets.log_probabilities_NK.exp().sum(-1)
        torch.testing.assert_close(tail_N, 1 - expected_NK.exp().sum(-1), rtol=1e-4, atol=1e-6)


def test_the_compact_form_trains_like_the_top_of_a_live_teacher(
    captured: Captured, data: Words, live: Teacher, student_folder: str
) -> None:
    offline = open_offline_teacher(captured(form="top_k", top_k=9), data)
    student = load_model(student_folder)
    for batch in data.train_dataloader():
        given = (answer_hidden(student, batch), head_of(student))
        live_targets = FullTargets(live.answer_hidden(batch), head_of(live.model))
        rest = (answer_labels(batch), Objective({"top_k_kl": 1.0}, top_k=9))
        found, _ = linear_objective(*given, offline.targets(batch), *rest, vocabulary=offline.vocabulary)
        expected, _ = linear_objective(*given, live_targets, *rest, vocabulary=offline.vocabulary)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_token_ids_beyond_two_bytes_and_tiny_tails_survive() -> None:
    torch.manual_seed(0)
    vocabulary, top_k = 70_000, 5
    head = Head(3 * torch.randn(vocabulary, 8))
    hidden_NE = 2 * torch.randn(20, 8)
    columns = encode_top_k(hidden_NE, head, top_k, vocabulary)
    assert (
        bytes_per_token(top_k_layout(top_k, vocabulary))
        == 5 * top_k + 4
        == sum(c.nbytes for c in columns.values()) // 20
    )
    found_NK, tokens_NK = decode_top_k(columns)
    log_p_NV = head.logits(hidden_NE).double().log_softmax(-1)
    expected_NK, expected_tokens_NK = log_p_NV.topk(top_k)
    assert torch.equal(tokens_NK, expected_tokens_NK) and int(tokens_NK.max()) >= 2**16
    torch.testing.assert_close(found_NK.double(), expected_NK, rtol=1e-3, atol=1e-3)
    tail_N = 1 - expected_NK.exp().sum(-1)
    assert float(tail_N.min()) < 1e-4
    torch.testing.assert_close(1 - found_NK.double().exp().sum(-1), tail_N, rtol=1e-2, atol=1e-6)


def test_all_tokens_may_be_kept() -> None:
    head = Head(torch.randn(11, 8))
    hidden_NE = torch.randn(4, 8)
    found_NK, _ = decode_top_k(encode_top_k(hidden_NE, head, 11, 11))
    torch.testing.assert_close(found_NK.exp().sum(-1), torch.ones(4))


def test_references() -> None:
    assert is_offline("offline:teacher-cache") and not is_offline("owner/offline")


# What is refused ------------------------------------------------------------------------------------------------------

HASH = r"[0-9a-f]{12}"


def test_another_tokenizer_is_refused_with_both_values(captured: Captured, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    expected = rf"expected the tokenizer .*, {HASH} \(tokens 260\), found {HASH} \(tokens 261\); train with"
    with pytest.raises(ValueError, match=expected):
        open_offline_teacher(captured(), Words(other))


def test_another_template_is_refused_with_both_values(captured: Captured, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other")
    byte_tokenizer(CHATML + "{# changed #}").save_pretrained(other)
    expected = rf"expected the template .*, {HASH} \(characters \d+\), found {HASH} \(characters \d+\)"
    with pytest.raises(ValueError, match=expected):
        open_offline_teacher(captured(), Words(other))


@pytest.mark.parametrize("change", [{"max_length": 60}, {"system_prompt": "Be brief."}], ids=str)
def test_other_data_is_refused_with_both_values(change: dict, captured: Captured, student_folder: str) -> None:
    value = rf"{HASH} \(samples 50, tokens \d+, answer_tokens \d+\)"
    with pytest.raises(ValueError, match=f"expected the data of the split train .*, {value}, found {value}"):
        open_offline_teacher(captured(), Words(student_folder, **change))


def test_another_seed_of_generated_tasks_is_refused(captured: Captured, student_folder: str) -> None:
    pytest.importorskip("reasoning_gym")
    from datamodules import ReasoningTasks

    def tasks(seed: int) -> ReasoningTasks:
        return ReasoningTasks(student_folder, {"gcd": {}}, train_size=6, val_size=3, test_size=3, seed=seed)

    folder = captured(datamodule=tasks(1))
    open_offline_teacher(folder, tasks(1))
    with pytest.raises(ValueError, match="expected the data of the split train .* found"):
        open_offline_teacher(folder, tasks(2))


def test_what_was_not_captured_is_refused(captured: Captured, data: Words, tmp_path: Path) -> None:
    folder = captured()
    with pytest.raises(ValueError, match="expected the split test in .*, found train, val; capture it too"):
        open_offline_teacher(folder, data, ["train", "test"])
    with pytest.raises(FileNotFoundError, match="expected a captured teacher in .* no index.json"):
        open_offline_teacher(tmp_path / "nothing", data)
    offline = open_offline_teacher(f"offline:{folder}", data, ["train"])
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match="expected the split val in .*, found train"):
        offline.targets(batch, "val")
    with pytest.raises(ValueError, match="found sample 1000;"):
        offline.targets({**batch, "index": [1000, *batch["index"][1:]]})
    with pytest.raises(ValueError, match="with the tokens it was captured with"):
        offline.targets({**batch, "index": batch["index"][::-1]})


def test_the_students_own_answers_are_refused(captured: Captured, data: Words) -> None:
    offline = open_offline_teacher(captured(), data)
    batch = next(iter(data.train_dataloader()))
    rows = len(batch["index"])
    own = Rollout(torch.full((rows, 3), 40), [3] * rows)
    with pytest.raises(ValueError, match="the student's own included; use a live teacher"):
        offline.targets(rollout_batch(batch, own))


def test_the_compact_form_has_no_whole_distribution(captured: Captured, data: Words) -> None:
    offline = open_offline_teacher(captured(form="top_k"), data)
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match="expected a capture of the form exact .* found top_k"):
        offline.answer_logits(batch)


def test_damaged_and_missing_files_are_refused(captured: Captured, data: Words) -> None:
    folder = captured()
    path = folder / "train-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="expected a whole shard in .*train-00001"):
        open_offline_teacher(folder, data)
    broken = bytearray(whole)
    broken[-3] ^= 1  # the columns come last
    path.write_bytes(broken)
    offline = open_offline_teacher(folder, data)
    with pytest.raises(ValueError, match=r"expected the checksum [0-9a-f]{8} for sample \d+ in .*train-00001"):
        list(map(offline.targets, data.train_dataloader()))
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match="expected 4 files of the split train .*, found 3; run the capture again"
    ):
        open_offline_teacher(folder, data)
    path.write_bytes(whole)
    head = folder / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-2] + b"xx")
    with pytest.raises(ValueError, match="expected the captured teacher's head .* other bytes"):
        open_offline_teacher(folder, data)
