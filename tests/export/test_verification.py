"""Prompts in groups: every prompt counts, and what is found does not depend on the groups."""

from dataclasses import asdict, replace

import pytest
import torch
from tiny_models import left_padded_prompts, quantized, tiny_model

from export import verification
from export.checks import Check, merged
from export.layout import GRAPH
from export.progress import Phases
from export.settings import ExportSettings
from export.to_onnx import export_onnx
from export.verification import longest_prompt, verify_artefacts

PROMPTS = left_padded_prompts()
FIRST = Check(
    "decode", "passed", bound=0.1, max_abs_difference=3.0, mean_abs_difference=1.0, max_relative_difference=0.05
)
FIRST = replace(
    FIRST, greedy_agreement=1.0, identical_texts=1.0, kl=0.1, prompts=1, tokens=10, worst="logits at step 1"
)


def checks_of(groups_of: int, precision: str, tmp_path, monkeypatch) -> dict[str, Check]:
    model = tiny_model(layers=1) if precision == "fp32" else quantized(tiny_model(layers=1))
    if not (tmp_path / GRAPH).is_file():
        export_onnx(model, tmp_path / GRAPH, precision=precision)
    monkeypatch.setattr(verification, "PROMPTS_AT_ONCE", groups_of)
    settings = ExportSettings(precision=precision, formats=("onnx",), decode_steps=3)
    phases = Phases()
    checks = verify_artefacts(model, tmp_path, None, settings, PROMPTS, phases)
    assert list(phases.seconds) == [
        "Reference run in torch",
        "Verification of model.onnx",
        "Verification of the longest prompt",
    ]
    return {check.name: check for check in checks}


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_groups_find_what_one_batch_finds(precision, tmp_path, monkeypatch):
    assert len(PROMPTS["prompt_ids"]) == 3
    whole, parts = (checks_of(size, precision, tmp_path, monkeypatch) for size in (3, 2))
    assert whole.keys() == parts.keys() and {check.status for check in parts.values()} == {"passed"}
    decode = f"onnx {precision}, decode"
    assert parts[decode].prompts == 3 and parts[decode].identical_texts == 1.0
    tokens = int(PROMPTS["prompt_mask"].sum())
    assert [check[f"onnx {precision}, prefill"].tokens for check in (whole, parts)] == [tokens, tokens]
    assert parts[decode].tokens == 3 * 3
    alone = f"onnx {precision}, one prompt at a time"
    assert parts[alone].tokens < whole[alone].tokens == tokens  # a group of one has nothing to take apart


def test_every_prompt_is_in_one_group_without_needless_padding():
    parts = list(verification._groups(PROMPTS, 1))
    assert [words for words, _ in parts] == [f", prompts {n} to {n} of 3" for n in (1, 2, 3)]
    for row, (_, group) in enumerate(parts):
        mask_P = PROMPTS["prompt_mask"][row].bool()
        assert group["prompt_mask"].all()
        assert torch.equal(group["prompt_ids"][0], PROMPTS["prompt_ids"][row, mask_P])
    [(words, group)] = verification._groups(PROMPTS, 3)
    assert words == "" and torch.equal(group["prompt_ids"], PROMPTS["prompt_ids"])


def test_means_are_over_all_tokens_and_differences_the_largest():
    second = replace(
        FIRST, tokens=30, prompts=3, kl=0.5, mean_abs_difference=2.0, max_abs_difference=1.0, identical_texts=0.0
    )
    [check] = merged([[FIRST], [second]])
    assert (check.kl, check.mean_abs_difference, check.max_abs_difference) == (pytest.approx(0.4), 1.75, 3.0)
    assert (check.identical_texts, check.prompts, check.tokens, check.status) == (0.25, 4, 40, "passed")


def test_one_failed_difference_fails_all_and_says_which():
    bad = replace(FIRST, status="failed", reason="the bad one", max_relative_difference=0.2, worst="logits at step 9")
    [check] = merged([[FIRST], [bad], [FIRST]])
    assert (check.status, check.reason, check.worst) == ("failed", "the bad one", "logits at step 9")
    [check] = merged([[FIRST], [replace(bad, max_relative_difference=float("nan"))]])
    assert check.status == "failed"


@pytest.mark.parametrize(("kl", "status"), [(0.15, "passed"), (0.35, "failed"), (float("nan"), "failed")])
def test_a_bounded_mean_is_the_mean_of_all_tokens(kl, status):
    """One group beyond its bound is no failure by itself, and bounds of groups differ with their sensitivity."""
    good = replace(FIRST, bounded="kl", kl=0.05, bound=0.1, sensitivity=0.05)
    bad = replace(good, status="failed", reason="the bad one", kl=kl, bound=0.2, sensitivity=0.1)
    [check] = merged([[good], [bad]])
    assert check.status == status and (check.reason == "the bad one") == (status == "failed")
    assert (check.bound, check.sensitivity) == (pytest.approx(0.15), pytest.approx(0.075))


def test_what_did_not_run_stays_so():
    not_run = Check("engine fp16, decode", "not_run", reason="no GPU")
    audit = Check("products", "failed", reason="expected 7, found 6")
    assert list(map(asdict, merged([[not_run], [not_run], [audit]]))) == [asdict(not_run), asdict(audit)]


def test_the_longest_prompt_repeats_all_tokens():
    longest = longest_prompt(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]]), 7)
    assert longest["prompt_ids"].tolist() == [[5, 6, 7, 5, 6, 7, 5]] and longest["prompt_mask"].sum() == 7
