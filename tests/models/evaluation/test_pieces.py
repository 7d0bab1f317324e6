"""Logits of an evaluation are never held whole: the same figures from pieces, in little memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from models.evaluation.answers import AnswerMetrics
from models.hardware.freed_memory import keep_freed_memory
from models.losses import output_head
from models.losses.output_head import LazyLogits, pieces_of
from models.pruning.depth import removal_loss
from models.pruning.scores.curvature import collect_curvature
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_batch, tiny_model

VOCABULARY = 151_936  # Qwen2.5


def judged(num_tokens: int) -> AnswerMetrics:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, VOCABULARY, 16, generator=generator) / 8
    hidden_ND = torch.randn(num_tokens, 16, generator=generator)
    labels_N = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    student, teacher = (
        LazyLogits(hidden_ND, lambda x_ND, head=head: F.linear(x_ND, head), VOCABULARY) for head in heads
    )
    metrics = AnswerMetrics()
    metrics.update(student, labels_N, teacher)
    return metrics


def test_pieces_give_the_figures_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(pieces_of(256, VOCABULARY)) == 5
    found = judged(256).compute()
    monkeypatch.setattr(output_head, "LOGITS_AT_ONCE", 256 * VOCABULARY)
    assert len(pieces_of(256, VOCABULARY)) == 1
    assert found == pytest.approx(judged(256).compute(), rel=1e-6)


def measure(num_tokens: int) -> None:
    """Print the bytes that an evaluation takes, in a process that keeps freed memory as training on a CPU does."""
    keep_freed_memory()
    judged(8)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here

    def kibibytes(what: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
        return int(line.split()[1])

    before = kibibytes("VmRSS")
    assert judged(num_tokens).compute()["kl"] > 0
    print(1024 * (kibibytes("VmHWM") - before))


@pytest.mark.long
def test_sixteen_thousand_tokens_take_less_than_a_gigabyte() -> None:
    """All their logits would be 10 GB, once."""
    program = "from tests.models.evaluation.test_pieces import measure; measure(16_384)"
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    assert int(ended.stdout.split()[-1]) < 1e9


def test_statistics_of_pruning_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(), tiny_batch()

    def statistics() -> list[torch.Tensor]:
        loss = torch.tensor(removal_loss(model, [batch], [1]))
        layers = collect_curvature(model, [batch])
        return [loss, *(part.gram_PP for layer in layers for part in (layer.o_proj, layer.down_proj))]

    whole = statistics()
    monkeypatch.setattr(output_head, "LOGITS_AT_ONCE", 3 * 300)
    assert len(pieces_of(20, 300)) == 7
    for ours, expected in zip(statistics(), whole, strict=True):
        torch.testing.assert_close(ours, expected)
