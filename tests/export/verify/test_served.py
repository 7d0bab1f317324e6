"""A graph as it is served, judged: the same figures as whole forward passes in torch and a plain loop of greedy tokens give."""

import math

import pytest
import torch

from datamodules.chat import Conversation, encode
from datamodules.collate import collate, pad_id_of
from export.onnx_graph.to_onnx import export_onnx
from export.sessions.onnx_session import OnnxSession
from export.verify.served import HeldOut, Served, clustered_mean, wilson
from models.forward import answer_labels, answer_lengths, answer_logits
from models.losses import forward_kl
from tests.helpers.tiny_models import tiny_model, tiny_tokenizer

END = [2]


@pytest.fixture(scope="module")
def batches():
    pairs = [
        ("What is 2 plus 2?", "4"),
        ("Say hi", "hi, hi, hi"),
        ("a", "bcd"),
        ("Name a colour", "blue"),
        ("Hm", "no"),
    ]
    tokenizer = tiny_tokenizer()
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    # The last conversation has two turns: what came before the last answer belongs to its prompt.
    turns[-1] = [*turns[0], *turns[-1]]
    examples = encode(tokenizer, [Conversation(turn, f"pair {i}") for i, turn in enumerate(turns)])
    return [{**collate(examples[start : start + 3], pad_id=pad_id_of(tokenizer))} for start in (0, 3)]


@pytest.fixture(scope="module")
def student():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def session(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_onnx(student, path, precision="fp32")
    return OnnxSession(path)


def test_the_distance_is_that_of_whole_forward_passes(session, student, batches):
    teacher = tiny_model(seed=4)
    with torch.no_grad():
        theirs = [answer_logits(teacher, batch) for batch in batches]
        expected, conversations = [], []
        for batch, logits_NV in zip(batches, theirs, strict=True):
            kl_N = forward_kl(answer_logits(student, batch), logits_NV)
            last = torch.cat([_behind_the_prompt(batch, row) for row in range(len(batch["index"]))])
            expected.append(kl_N[last])
            rows = torch.tensor(batch["index"]).repeat_interleave(torch.tensor(answer_lengths(batch)))
            conversations.append(rows[last])
    assert len(torch.cat(expected)) < sum(len(answer_labels(batch)) for batch in batches)  # of two turns one is judged
    served = HeldOut(batches, lambda number, _, n: theirs[number][n]).measure(session, END, lambda: None)
    assert served.scores == ()
    order, wanted = served.conversation_N.argsort(stable=True), torch.cat(conversations).argsort(stable=True)
    torch.testing.assert_close(served.kl_N[order], torch.cat(expected)[wanted], rtol=1e-3, atol=1e-4)
    assert torch.equal(served.conversation_N[order], torch.cat(conversations)[wanted])


def _behind_the_prompt(batch, row):
    """Of one row's answer tokens, which are those of its last answer."""
    positions = (batch["labels"][row, 1:] != -100).nonzero()[:, 0] + 1
    return positions >= int(batch["prompt_mask"][row].sum())


def test_the_score_is_that_of_greedy_answers(session, student, batches):
    tokenizer, seen = tiny_tokenizer(), []

    def scorer(texts, batch):
        seen.extend(texts)
        return [float(len(text) % 2) for text in texts]

    teacher_logits = [torch.zeros(len(answer_labels(batch)), 128) for batch in batches]
    held_out = HeldOut(batches, lambda number, _, n: teacher_logits[number][n], tokenizer, scorer, max_new_tokens=6)
    served = held_out.measure(session, END, lambda: None)
    expected = []
    for batch in batches:
        for ids_P, mask_P in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True):
            ids_1P = ids_P[mask_P.bool()][None]
            tokens = student.generate(ids_1P, max_new_tokens=6, do_sample=False, eos_token_id=END, pad_token_id=2)
            expected.append(tokenizer.decode(tokens[0, ids_1P.shape[1] :], skip_special_tokens=True))
    assert seen == expected and len(set(seen)) > 1
    assert list(served.scores) == [float(len(text) % 2) for text in expected]


def test_tokens_of_one_conversation_do_not_count_as_many():
    """Ten conversations whose tokens are all alike say as much as ten tokens."""
    values_N = torch.rand(10, generator=torch.Generator().manual_seed(0)).repeat_interleave(50)
    mean, low, high = clustered_mean(values_N, torch.arange(10).repeat_interleave(50))
    error = 1.96 * float(values_N[::50].double().std()) / math.sqrt(10)
    assert mean == pytest.approx(float(values_N.mean()), abs=1e-6)
    assert (low, high) == (pytest.approx(mean - error), pytest.approx(mean + error))
    _, alone, _ = clustered_mean(values_N, torch.arange(500))
    assert alone - low > 0.5 * error


def test_wilson_of_a_textbook_case():
    """Agresti and Coull 1998: 0 of 10 has an upper end of 0.278."""
    assert wilson([0.0] * 10) == (0, pytest.approx(0, abs=1e-9), pytest.approx(0.278, abs=1e-3))
    mean, low, high = wilson([1.0] * 50 + [0.0] * 50)
    assert (mean, high - mean) == (0.5, pytest.approx(mean - low)) and high == pytest.approx(0.596, abs=1e-3)


def test_the_figures_have_their_intervals_and_counts():
    figures = Served(torch.tensor([0.1, 0.3]), torch.tensor([7, 9]), (1.0, 0.0)).figures()
    assert figures["kl"] == pytest.approx(0.2)
    assert figures["kl_low"] < 0.2 < figures["kl_high"]
    assert (figures["tokens"], figures["questions"], figures["task_score"]) == (2, 2, 0.5)
    assert "task_score" not in Served(torch.tensor([0.1]), torch.tensor([0]), ()).figures()
