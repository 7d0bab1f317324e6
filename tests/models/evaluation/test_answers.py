"""Figures against numbers computed one token at a time."""

import math

import pytest
import torch
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.evaluation.answers import AnswerMetrics, evaluate, generate_texts
from models.forward import answer_labels, answer_logits, lazy_logits
from models.generation.decoder import FusedDecoder, TransformersDecoder, decoder_for
from models.loading.reference import end_token_ids
from models.quantization import freeze_scales
from models.structure.edits import apply_edit, quantize_decoder
from models.teacher import Teacher
from tests.helpers.chat_doubles import byte_tokenizer
from tests.helpers.tiny import tiny_batch, tiny_model

LONGER = [("one two three four", "five six"), ("?", "!")]


def teacher_of(model: PreTrainedModel) -> Teacher:
    """A teacher without a folder."""
    teacher = object.__new__(Teacher)
    teacher.model = model.eval().requires_grad_(False)
    return teacher


def naive_figures(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: list[Batch], vocab: int
) -> dict[str, float]:
    """Means over all answer tokens of all batches, in double precision."""
    nll, kl, agree = [], [], []
    for batch in batches:
        labels = answer_labels(batch).tolist()
        with torch.no_grad():
            pairs = zip(answer_logits(student, batch), answer_logits(teacher, batch), labels, strict=True)
        for ours, theirs, label in pairs:
            log_q = ours[:vocab].double().log_softmax(0)
            log_p = theirs[:vocab].double().log_softmax(0)
            nll.append(-log_q[label].item())
            kl.append(sum(math.exp(p) * (p - q) for p, q in zip(log_p.tolist(), log_q.tolist(), strict=True)))
            agree.append(float(log_q.argmax() == log_p.argmax()))
    return {
        "perplexity": math.exp(sum(nll) / len(nll)),
        "kl": sum(kl) / len(kl),
        "top1_agreement": sum(agree) / len(agree),
    }


def mixed(a: PreTrainedModel, b: PreTrainedModel, share: float) -> PreTrainedModel:
    """A student that agrees with its teacher on some tokens."""
    with torch.no_grad():
        for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
            ours.lerp_(theirs, share)
    return a


@pytest.fixture
def student() -> PreTrainedModel:
    return mixed(tiny_model(seed=1), tiny_model(), 0.85)


def test_metrics_are_means_over_tokens_not_over_batches(student: PreTrainedModel, model: PreTrainedModel) -> None:
    batches = [tiny_batch(), tiny_batch(LONGER)]
    metrics = AnswerMetrics()
    for batch in batches:
        metrics.update(lazy_logits(student, batch), answer_labels(batch), lazy_logits(model, batch))
    expected = naive_figures(student, model, batches, 300)
    assert metrics.compute() == pytest.approx(expected, rel=1e-4)
    assert 0.1 < expected["top1_agreement"] < 0.9
    assert expected["kl"] > 0.01


def test_metrics_without_data_are_left_out(model: PreTrainedModel, batch: Batch) -> None:
    metrics = AnswerMetrics()
    assert metrics.compute() == {}
    metrics.update(lazy_logits(model, batch), answer_labels(batch), None)
    assert set(metrics.compute()) == {"perplexity"}
    metrics.task_score.update(torch.tensor([1.0, 0.0, 0.0]))
    metrics.task_score.update(torch.tensor([1.0]))
    assert metrics.compute()["task_score"] == 0.5
    metrics.reset()
    assert metrics.compute() == {}


def test_metrics_never_enter_a_checkpoint(model: PreTrainedModel, batch: Batch) -> None:
    metrics = AnswerMetrics()
    metrics.update(lazy_logits(model, batch), answer_labels(batch), lazy_logits(model, batch))
    assert not metrics.state_dict()


def test_heads_of_different_sizes_are_compared_over_the_common_ids(batch: Batch) -> None:
    student, teacher = tiny_model(vocab_size=320), tiny_model(vocab_size=290, seed=1)
    metrics = AnswerMetrics()
    metrics.update(lazy_logits(student, batch), answer_labels(batch), lazy_logits(teacher, batch))
    assert metrics.compute() == pytest.approx(naive_figures(student, teacher, [batch], 290), rel=1e-4)


def test_evaluate_in_float32(student: PreTrainedModel, model: PreTrainedModel) -> None:
    batches = [tiny_batch(), tiny_batch(LONGER)]
    figures = evaluate(student, batches, tokenizer=byte_tokenizer(), teacher=teacher_of(model), dtype=torch.float32)
    assert figures == pytest.approx(naive_figures(student, model, batches, 300), rel=1e-4)


def test_a_copy_of_the_teacher_is_as_good_as_the_teacher(model: PreTrainedModel, batch: Batch) -> None:
    figures = evaluate(
        tiny_model(), [batch], tokenizer=byte_tokenizer(), teacher=teacher_of(model), dtype=torch.float32
    )
    assert figures["kl"] == pytest.approx(0, abs=1e-6)
    assert figures["top1_agreement"] == 1


def test_the_teacher_itself(model: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is judged in its own precision, and neither copied nor run twice."""
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append("whole"))
    model.base_model.register_forward_pre_hook(lambda *_: runs.append("body"))
    figures = evaluate(model, [batch], tokenizer=byte_tokenizer(), teacher=teacher_of(model), dtype=torch.bfloat16)
    assert (figures["kl"], figures["top1_agreement"]) == (0, 1)
    assert figures["perplexity"] == pytest.approx(naive_figures(model, model, [batch], 300)["perplexity"], rel=1e-4)
    assert runs.count("body") == 1 + 2  # once by evaluate, twice by the naive figures


def test_scores_of_generated_answers(model: PreTrainedModel) -> None:
    """The scorer sees the texts that greedy decoding gives, with the batch they answer."""
    batches = [tiny_batch(), tiny_batch(LONGER)]
    seen: list[tuple[list[str], list[str]]] = []

    def scorer(texts: list[str], batch: Batch) -> list[float]:
        seen.append((texts, batch["answers"]))
        return [float(i == 0) for i in range(len(texts))]

    tokenizer = byte_tokenizer()
    figures = evaluate(model, batches, tokenizer=tokenizer, scorer=scorer, max_new_tokens=5, dtype=torch.float32)
    assert figures["task_score"] == pytest.approx(2 / 7)
    assert set(figures) == {"perplexity", "task_score"}
    assert [answers for _, answers in seen] == [batch["answers"] for batch in batches]
    decoder, ends = decoder_for(model, torch.float32), end_token_ids(model)
    settings = {"max_new_tokens": 5, "end_tokens": ends}
    assert [texts for texts, _ in seen] == [generate_texts(decoder, tokenizer, batch, **settings) for batch in batches]


def test_no_tokens_no_score(model: PreTrainedModel, batch: Batch) -> None:
    def scorer(texts: list[str], batch: Batch) -> list[float]:
        raise AssertionError("nothing should be generated")

    assert set(evaluate(model, [batch], tokenizer=byte_tokenizer(), scorer=scorer)) == {"perplexity"}


def test_texts_are_those_of_plain_generation(batch: Batch) -> None:
    """transformers' own `generate` finds the same words, one prompt at a time."""
    model, tokenizer = tiny_model(), byte_tokenizer()
    expected = []
    for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True):
        prompt = ids[mask.bool()][None]
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        expected.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    for decoder in (TransformersDecoder(model, torch.float32), FusedDecoder(model, torch.float32)):
        texts = generate_texts(decoder, tokenizer, batch, max_new_tokens=8, end_tokens=end_token_ids(model))
        assert texts == expected
    assert len(set(expected)) > 1


def test_judging_changes_nothing(model: PreTrainedModel, batch: Batch) -> None:
    """Not the weights, not the mode, not the ranges of quantizers that still observe."""
    apply_edit(model, quantize_decoder(model))
    answer_logits(model.train(), batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(
        model, [tiny_batch(LONGER)], tokenizer=byte_tokenizer(), scorer=lambda t, b: [0.0] * len(t), max_new_tokens=3
    )
    assert model.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_quantization_counts(model: PreTrainedModel, batch: Batch) -> None:
    """A quantized student is judged with its rounding."""
    teacher = teacher_of(tiny_model())
    apply_edit(model, quantize_decoder(model))
    answer_logits(model.train(), batch)
    settings = {"tokenizer": byte_tokenizer(), "teacher": teacher, "dtype": torch.float32}
    assert evaluate(model, [batch], **settings)["kl"] == pytest.approx(0, abs=1e-6)
    freeze_scales(model)
    assert evaluate(model, [batch], **settings)["kl"] > 1e-4
