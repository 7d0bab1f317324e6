"""Decoders against the whole forward pass, step by step; and a student in training, which they leave alone."""

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.architecture import FAMILIES
from models.forward import answer_logits
from models.generation import fused_decoder
from models.generation import fused_weights as inference_weights
from models.generation.decoder import Decoder, FusedDecoder, TransformersDecoder, decoder_for
from models.hardware.low_precision import quantize_weights
from models.quantization import freeze_scales
from models.structure.edits import apply_edit, quantize_decoder
from tests.helpers.rollouts import DECODERS, KINDS, STEPS, prompts_of, roll, student_of_kind, texts
from tests.helpers.tiny import tiny_model

NEW = 5
TOKENS_NB = torch.randint(0, 300, (NEW, 5), generator=torch.Generator().manual_seed(4))
KEPT = {1: [0, 2, 3, 4], 3: [3, 1]}  # after these steps, of the rows that are there


def stepwise(decoder: Decoder, batch: Batch) -> list[Tensor]:
    """Logits after the prompts and after every given token; some rows leave in between."""
    rows = list(range(5))
    logits = [decoder.prefill(batch["prompt_ids"], batch["prompt_mask"], NEW)]
    for position, token_B in enumerate(TOKENS_NB):
        if position in KEPT:
            decoder.keep(torch.tensor(KEPT[position]))
            rows = [rows[row] for row in KEPT[position]]
        logits.append(decoder.step(token_B[rows]))
    return logits


@torch.no_grad()
def naive_stepwise(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    rows, given = list(range(5)), prompts_of(batch)
    logits = [torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in given])]
    for position, token_B in enumerate(TOKENS_NB.tolist()):
        for row, token in enumerate(token_B):
            given[row] = given[row] + [token]
        if position in KEPT:
            rows = [rows[row] for row in KEPT[position]]
        logits.append(torch.stack([model(torch.tensor([given[row]])).logits[0, -1] for row in rows]))
    return logits


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, as a share of the largest logit."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def root_mean_square(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The difference of all logits."""
    differences = torch.cat([(a.float() - b.float()).flatten() for a, b in zip(ours, theirs, strict=True)])
    return float(differences.square().mean().sqrt())


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_float32(kind: str, decoder: type, batch: Batch) -> None:
    model = student_of_kind(kind, batch)
    ours = stepwise(decoder(model, torch.float32), batch)
    assert distance(ours, naive_stepwise(model.eval(), batch)) < 1e-4


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "pruned", "biased", "untied"])
def test_logits_in_bfloat16(kind: str, packs: bool, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from float32 than 5 % of the largest logit, and on average no further than the model's own forward pass."""
    if packs and not inference_weights._can_pack(torch.empty(1, 1, dtype=torch.bfloat16)):
        pytest.skip("this processor has no bfloat16 products in oneDNN")
    if not packs:
        monkeypatch.setattr(inference_weights, "_can_pack", lambda weight: False)
    model = student_of_kind(kind, batch)
    exact = naive_stepwise(model, batch)
    ours = stepwise(FusedDecoder(model, torch.bfloat16), batch)
    assert {logits.dtype for logits in ours} == {torch.bfloat16}
    own = stepwise(TransformersDecoder(model, torch.bfloat16), batch)
    assert 1e-4 < distance(ours, exact) < 0.05
    assert root_mean_square(ours, exact) < 1.05 * root_mean_square(own, exact)


@pytest.mark.parametrize("kind", ["llama", "pruned"])
def test_the_cache_is_read_in_widening_windows(kind: str, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow ones, so that prompts end inside of one, steps cross into the next, and rows leave in between."""
    model = student_of_kind(kind, batch)
    exact = naive_stepwise(model.eval(), batch)
    for window in (1, 2, 3):
        monkeypatch.setattr(fused_decoder, "WINDOW", window)
        assert distance(stepwise(FusedDecoder(model, torch.float32), batch), exact) < 1e-4


def test_quantized_students_in_bfloat16(batch: Batch) -> None:
    model = student_of_kind("frozen", batch)
    exact = naive_stepwise(model.eval(), batch)
    own, ours = (distance(stepwise(decoder(model, torch.bfloat16), batch), exact) for decoder in DECODERS)
    assert ours < max(0.05, 1.5 * own)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["llama", "pruned", "frozen", "observing"])
def test_a_new_decoder_has_the_present_weights(kind: str, decoder: type, batch: Batch) -> None:
    model = student_of_kind(kind, batch).train()
    before = stepwise(decoder(model, torch.float32), batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    answer_logits(model, batch).square().mean().backward()
    optimizer.step()
    after = stepwise(decoder(model, torch.float32), batch)
    assert distance(after, before) > 1e-3
    assert distance(after, naive_stepwise(model.eval(), batch)) < 1e-4


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_new_decoder_follows_quantizers_that_were_frozen(decoder: type, batch: Batch) -> None:
    model = student_of_kind("observing", batch)
    before = stepwise(decoder(model, torch.float32), batch)
    freeze_scales(model)
    after = stepwise(decoder(model, torch.float32), batch)
    assert distance(after, before) > 1e-3
    assert distance(after, naive_stepwise(model.eval(), batch)) < 1e-4


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["llama", "observing", "frozen"])
def test_a_student_in_training_stays_as_it_is(kind: str, decoder: type, batch: Batch) -> None:
    """Weights, mode, gradients, and the ranges of quantizers that still observe."""
    model = student_of_kind(kind, batch).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert (kind == "llama") or any("amax" in name for name in before)
    wild = {"prompt_ids": batch["prompt_ids"].flip(0), "prompt_mask": torch.ones_like(batch["prompt_mask"])}
    answers = roll(decoder(model, torch.float32), wild, 2.0)
    assert not answers.tokens_BG.requires_grad
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Which decoder ------------------------------------------------------------------------------------------------------


def with_adapters() -> PreTrainedModel:
    pytest.importorskip("peft")
    model = tiny_model()
    apply_edit(model, {"op": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "down_proj"]})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def in_8_bits() -> PreTrainedModel:
    pytest.importorskip("torchao")
    model = tiny_model().requires_grad_(False)
    quantize_weights(model.base_model)
    return model


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
UNSUPPORTED = {
    "sliding window": partial(tiny_model, "mistral", sliding_window=4),
    "sliding layers": partial(
        tiny_model, "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=2
    ),
    "dynamic rope": partial(tiny_model, rope_parameters=DYNAMIC, max_position_embeddings=12),
    "soft caps": partial(tiny_model, "gemma2", final_logit_softcapping=2.0),
    "lora": with_adapters,
    "8 bits": in_8_bits,
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_others_are_left_to_transformers_and_right(kind: str, batch: Batch) -> None:
    model = UNSUPPORTED[kind]()
    assert not FusedDecoder.supports(model)
    sampler = decoder_for(model, torch.float32)
    assert type(sampler) is TransformersDecoder
    if kind == "dynamic rope":  # the frequencies follow the longest row of the batch, also without a cache
        batch = {key: batch[key][:1] for key in ("prompt_ids", "prompt_mask")}
        answer = texts(roll(sampler, batch, max_new_tokens=1))[0]
        with torch.no_grad():
            assert answer == [int(model(torch.tensor(prompts_of(batch))).logits[0, -1].argmax())]
        return
    assert distance(stepwise(sampler, batch), naive_stepwise(model, batch)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_of_every_family(family: str, batch: Batch) -> None:
    """Twelve tokens through the cache, past the sliding windows, against the whole forward pass for each."""
    model = tiny_model(family, num_hidden_layers=3)
    assert FusedDecoder.supports(model) == (family in ("llama", "qwen2", "qwen3"))  # the tiny Mistral has a window
    given = prompts_of(batch)
    for _ in range(STEPS):
        with torch.no_grad():
            given = [[*row, int(model(torch.tensor([row])).logits[0, -1].argmax())] for row in given]
    answers = [row[len(prompt) :] for row, prompt in zip(given, prompts_of(batch), strict=True)]
    assert texts(roll(model, batch)) == answers


def test_supported_families_get_the_fused_decoder(model: PreTrainedModel) -> None:
    assert type(decoder_for(model, torch.float32)) is FusedDecoder
    apply_edit(model, quantize_decoder(model))
    assert type(decoder_for(model, torch.float32)) is FusedDecoder
