"""An output head in blocks: its own weight, rounded after what predictions come from, and trained like any other."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from export.folders.student import load_student, save_student
from models.architecture import FAMILIES
from models.copies import inference_copy
from models.forward import answer_hidden, answer_labels, answer_logits
from models.losses import Objective, forward_kl, linear_objective
from models.losses.output_head import check_head, head_of
from models.post_training.calibrate import quantize_after_training
from models.post_training.format_choice import formats_by_pattern
from models.post_training.head import uncertainty
from models.post_training.rounding import gptq
from models.post_training.settings import PostTrainingQuantization
from models.quantization import FakeQuantizedLinear, format_of, freeze_scales, quantized_linears
from models.structure.edits import apply_edit, replay
from tests.helpers.chat_doubles import byte_tokenizer
from tests.helpers.tiny import tiny_batch, tiny_model

BATCHES = [tiny_batch(), tiny_batch([("one two three four", "five six"), ("?", "!")])]
HEAD = {"op": "fake_quantize", "format": "int4_g32", "modules": ["lm_head"]}


def calibrated(model: PreTrainedModel, method: str = "quantease", **formats: str) -> PreTrainedModel:
    chosen = formats_by_pattern(model, formats.pop("others", "none"), {"lm_head": "int4_g32", **formats})
    settings = PostTrainingQuantization(method=method)  # type: ignore[arg-type]
    quantize_after_training(model, BATCHES, chosen, settings)
    return model


@torch.no_grad()
def kl(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    values = [forward_kl(answer_logits(model, batch), answer_logits(dense, batch)) for batch in BATCHES]
    return float(torch.cat(values).mean())


def test_only_its_very_name_means_the_head() -> None:
    model = tiny_model()
    assert "lm_head" not in formats_by_pattern(model, "int4_g32", {"*": "int8_g32"})
    assert formats_by_pattern(model, "none", {"lm_head": "int4_g32"})["lm_head"] == "int4_g32"
    with pytest.raises(ValueError, match=r"or lm_head, found 'lm\*', which fits none of 14"):
        formats_by_pattern(model, "int4_g32", {"lm*": "int8_g32"})


@pytest.mark.parametrize("format", ["fp8_e4m3", "int8"])
def test_a_format_that_rounds_inputs_is_refused_and_changes_nothing(format: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=f"a weight-only format for the output head, found {format}"):
        formats_by_pattern(model, "none", {"lm_head": format})
    with pytest.raises(ValueError, match=f"a weight-only format for the output head, found {format}"):
        apply_edit(model, HEAD | {"format": format})
    assert model.config.tie_word_embeddings
    assert type(model.lm_head) is torch.nn.Linear


def test_a_tied_head_gets_a_weight_of_its_own_and_the_embedding_stays() -> None:
    model = tiny_model()
    embedding, before = model.get_input_embeddings().weight, model.get_input_embeddings().weight.clone()
    optimizer = torch.optim.AdamW(model.parameters())
    count = len(optimizer.param_groups[0]["params"])
    apply_edit(model, HEAD, [optimizer])
    assert model.get_input_embeddings().weight is embedding
    assert model.lm_head.weight is not embedding
    assert torch.equal(model.lm_head.weight, before)
    assert not model.config.tie_word_embeddings
    # The order of a new optimizer, whose state is that of a checkpoint.
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert len(optimizer.param_groups[0]["params"]) == count + 1
    frozen = tiny_model().requires_grad_(False)
    apply_edit(frozen, HEAD, [optimizer])
    assert not frozen.lm_head.weight.requires_grad
    assert len(optimizer.param_groups[0]["params"]) == count + 1
    calibrated_model = calibrated(tiny_model())
    assert torch.equal(calibrated_model.get_input_embeddings().weight, before)


def test_an_untied_head_keeps_its_parameter() -> None:
    model = tiny_model(tie_word_embeddings=False)
    weight = model.lm_head.weight
    apply_edit(model, HEAD)
    assert model.lm_head.weight is weight


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_predicts_with_the_rounded_head(family: str) -> None:
    dense = tiny_model(family)
    model = calibrated(copy.deepcopy(dense))
    head = model.lm_head
    assert isinstance(head, FakeQuantizedLinear)
    assert head.weight_quantizer.frozen
    assert torch.equal(head.weight_quantizer(head.weight), head.weight)
    check_head(model, head_of(model))
    assert kl(model, dense) > 0
    assert kl(inference_copy(model, torch.float32), model) < 1e-9


def test_it_is_rounded_after_the_tokens_before_an_answers_by_their_uncertainty() -> None:
    dense = tiny_model()
    model = calibrated(copy.deepcopy(dense), "gptq", others="int8_g32")
    gram_DD = torch.zeros(32, 32, dtype=torch.float64)
    for batch in BATCHES:
        with torch.no_grad():
            hidden_ND = answer_hidden(model, batch)
            p_NV = (hidden_ND @ dense.lm_head.weight.T).softmax(-1)
        gram_DD += ((1 - p_NV.square().sum(-1, keepdim=True)) * hidden_ND).T.double() @ hidden_ND.double()
    expected = gptq(dense.lm_head.weight, gram_DD, format_of("int4_g32").weight, ordered=True)
    assert (expected.weight_OI != model.lm_head.weight).float().mean() < 0.01  # sums in another order decide ties
    assert kl(model, dense) < kl(calibrated(copy.deepcopy(dense), "nearest", others="int8_g32"), dense)


def test_uncertainty_is_what_small_errors_of_all_logits_cost() -> None:
    model = tiny_model()
    torch.manual_seed(0)
    with torch.no_grad():
        hidden_ND = answer_hidden(model, BATCHES[0])[:3]
        logits_NV = head_of(model).logits(hidden_ND)
        found_N = uncertainty(head_of(model), hidden_ND)[:, 0]
        size, draws = 1e-2, 20_000
        costs = [
            forward_kl(
                (row_V + size * torch.randn(draws, len(row_V))).double(), row_V.double().expand(draws, -1)
            ).mean()
            for row_V in logits_NV
        ]
    torch.testing.assert_close(found_N.double() * size**2 / 2, torch.stack(costs), rtol=0.05, atol=1e-9)


def test_the_loss_passes_its_gradient_through_the_rounding() -> None:
    model = tiny_model()
    apply_edit(model, HEAD)
    freeze_scales(model)
    hidden_ND, labels_N = answer_hidden(model, BATCHES[0]).detach(), answer_labels(BATCHES[0])
    loss, _ = linear_objective(hidden_ND, head_of(model), None, labels_N, Objective({"cross_entropy": 1.0}))
    loss.backward()
    found = model.lm_head.weight.grad
    rounded_VD = model.lm_head.weight_quantizer(model.lm_head.weight).detach().requires_grad_()
    F.cross_entropy(hidden_ND @ rounded_VD.T, labels_N, reduction="sum").backward()
    assert found.abs().max() > 0
    torch.testing.assert_close(found, rounded_VD.grad, rtol=1e-4, atol=1e-5)
    assert model.get_input_embeddings().weight.grad is None


def test_checkpoints_folders_and_plain_transformers_have_the_same_student(tmp_path: Path) -> None:
    model = calibrated(tiny_model(), others="int8_g32")
    twin = tiny_model(seed=1)
    replay(twin, [HEAD, *quantize_all(twin, "int8_g32")])
    twin.load_state_dict(model.state_dict())
    save_student(model, byte_tokenizer(), tmp_path / "student")
    loaded, _ = load_student(str(tmp_path / "student"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert quantized_linears(loaded).keys() == quantized_linears(model).keys()
    assert not plain.config.tie_word_embeddings
    with torch.no_grad():
        same = [answer_logits(each, BATCHES[0]) for each in (model, twin, loaded, plain)]
    assert all(torch.equal(logits, same[0]) for logits in same)


def quantize_all(model: PreTrainedModel, format: str) -> list[dict[str, object]]:
    names = formats_by_pattern(model, format, {})
    return [{"op": "fake_quantize", "format": format, "modules": list(names)}]


def test_hidden_channels_can_be_cut_behind_it() -> None:
    model = tiny_model()
    apply_edit(model, HEAD | {"format": "int8_weight_only"})
    freeze_scales(model)
    apply_edit(model, {"op": "narrow_hidden", "keep": list(range(16))})
    assert model.lm_head.in_features == 16
    check_head(model, head_of(model))
