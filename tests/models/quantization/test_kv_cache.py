"""Keys and values are rounded once, after rotary angles, with a cache and without, in every family, and take part in training."""

import copy
import math

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.architecture import CACHE, FAMILIES
from models.copies import inference_copy
from models.generation.fused_decoder import FusedDecoder
from models.post_training.calibrate import quantize_after_training
from models.post_training.settings import PostTrainingQuantization
from models.quantization import fake_quantize, merge_observations
from models.quantization.cache import (
    KeyQuantizer,
    cache_format,
    cache_quantizers,
    cache_scales,
    insert_cache_quantizers,
    remove_cache_quantizers,
)
from models.quantization.formats import Grid
from models.quantization.linear import freeze_scales, rounds_inputs
from models.structure.edits import apply_edit
from tests.helpers.tiny import tiny_model

IDS_BT = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def rounding(model, format="int8"):
    apply_edit(model, {"op": "quantize_cache", "format": format})
    with torch.no_grad():
        model.train()(input_ids=IDS_BT, use_cache=False)
    freeze_scales(model)
    return model.eval()


def logits(model, **settings):
    with torch.no_grad():
        return model(input_ids=IDS_BT, **settings).logits


@pytest.mark.parametrize("format", ["fp8_e4m3", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_growing_cache_gives_what_no_cache_gives(family, format):
    model = rounding(tiny_model(family), format)
    whole, cache, parts = logits(model, use_cache=False), DynamicCache(config=model.config), []
    with torch.no_grad():
        for ids_BT in (IDS_BT[:, :7], *IDS_BT[:, 7:].split(1, dim=1)):
            parts.append(model(input_ids=ids_BT, use_cache=True, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.equal(whole, logits(without(model), use_cache=False))


def without(model):
    plain = copy.deepcopy(model)
    remove_cache_quantizers(plain)
    return plain


def test_without_quantizers_it_is_the_model_that_it_was():
    model = tiny_model("llama")
    before = logits(model)
    assert torch.equal(logits(without(rounding(model))), before)
    assert cache_format(model) == "int8"
    assert cache_format(without(model)) is None
    assert "cache_quantizer" not in " ".join(without(model).state_dict())


@pytest.mark.parametrize("format", ["fp8_e4m3", "int8"])
def test_it_is_attention_over_rounded_keys_and_values(format):
    """The definition, written out for one layer of Llama's attention."""
    model = rounding(tiny_model("llama"), format)
    attention, quantizer = model.model.layers[0].self_attn, next(iter(cache_quantizers(model).values()))
    x_BTD = torch.randn(2, 12, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    angles = model.model.rotary_emb(x_BTD, torch.arange(12)[None])
    with torch.no_grad():
        ours, _ = attention(x_BTD, position_embeddings=angles, attention_mask=None)
        heads = [p(x_BTD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections(attention)]
        query, key = apply_rotary_pos_emb(heads[0], heads[1], *angles)
        key = fake_quantize(key, quantizer.key.scale, None, format)
        value = fake_quantize(heads[2], quantizer.value.scale, None, format)
        repeats = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) / math.sqrt(attention.head_dim)
        shares = scores.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        theirs = attention.o_proj((shares @ value.repeat_interleave(repeats, 1)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def projections(attention):
    return attention.q_proj, attention.k_proj, attention.v_proj


def test_gradients_pass_straight_through_to_keys_and_values():
    model = rounding(tiny_model("llama")).train()
    model(input_ids=IDS_BT, labels=IDS_BT, use_cache=False).loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.k_proj.weight.grad.abs().sum() > 0
        assert layer.self_attn.v_proj.weight.grad.abs().sum() > 0


def test_the_range_of_keys_covers_every_position():
    """Far beyond the positions of calibration, no pair of channels leaves the range."""
    key_BGTK = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(3))
    key_BGTK[0, 0, 0, [3, 11]] = 4.0  # the largest pair, at 45 degrees
    quantizer = KeyQuantizer(Grid("int8"), turned=16)
    quantizer.train()(key_BGTK)
    quantizer.freeze("max")
    first, second = key_BGTK.chunk(2, dim=-1)
    for angle in torch.linspace(0, 2 * math.pi, 64):
        turned = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
        assert turned.abs().max() <= quantizer.scale * 127 * (1 + 1e-5)
    assert float(quantizer.scale) == pytest.approx(4 * math.sqrt(2) / 127, rel=2e-3)  # what was seen is 4


def test_channels_without_angles_count_as_they_are():
    key_BGTK = torch.full((1, 1, 2, 16), 3.0)
    quantizer = KeyQuantizer(Grid("int8"), turned=8)
    key_BGTK[..., 8:] = 4.0
    quantizer.train()(key_BGTK)
    quantizer.freeze("max")
    assert float(quantizer.scale) == pytest.approx(3 * math.sqrt(2) / 127, rel=2e-3)
    key_BGTK[..., 8:] = 5.0
    other = KeyQuantizer(Grid("int8"), turned=8)
    other.train()(key_BGTK)
    other.freeze("max")
    assert float(other.scale) == pytest.approx(5 / 127, rel=2e-3)


def test_processes_share_what_they_see():
    one, other = tiny_model("llama"), tiny_model("llama")
    for model, ids_BT in ((one, IDS_BT), (other, IDS_BT.flip(1) + 1)):
        insert_cache_quantizers(model, format="int8")
        with torch.no_grad():
            model.train()(input_ids=ids_BT, use_cache=False)
    seen = [[q.pending for m in cache_quantizers(model).values() for q in (m.key, m.value)] for model in (one, other)]
    largest = torch.stack([torch.maximum(a[0], b[0]) for a, b in zip(*seen, strict=True)])
    merge_observations(one, lambda x, operation: largest if operation == "max" else x)
    found = torch.stack([q.amax for m in cache_quantizers(one).values() for q in (m.key, m.value)])
    assert torch.equal(found, largest)


def test_after_training_scales_come_from_valid_tokens_behind_quantized_layers():
    model = tiny_model("llama")
    mask_BT = torch.ones_like(IDS_BT)
    mask_BT[0, 7:] = 0
    batches = [{"input_ids": IDS_BT, "attention_mask": mask_BT, "labels": IDS_BT}]
    settings = PostTrainingQuantization(method="nearest", input_search="max")
    edits = quantize_after_training(model, batches, "int8_weight_only", settings, kv_cache="int8")
    assert edits[-1] == {"op": "quantize_cache", "format": "int8"}
    entered = {}
    for name, quantizer in cache_quantizers(model).items():
        quantizer.register_forward_pre_hook(lambda _, both, name=name: entered.update({name: both}))
    with torch.no_grad():
        model(input_ids=IDS_BT, attention_mask=mask_BT, use_cache=False)
    for name, quantizer in cache_quantizers(model).items():
        key_STK, value_STK = (x.transpose(1, 2)[mask_BT.bool()] for x in entered[name])
        pairs = torch.hypot(*key_STK.chunk(2, dim=-1)).max()
        assert float(quantizer.key.scale) == pytest.approx(float(pairs) / 127, rel=2e-3)
        assert float(quantizer.value.scale) == pytest.approx(float(value_STK.abs().max()) / 127, rel=2e-3)


def test_the_cache_alone_can_be_quantized_after_training():
    model = tiny_model("llama")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [{"input_ids": IDS_BT, "attention_mask": torch.ones_like(IDS_BT), "labels": IDS_BT}]
    names = {name: "none" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(quantize_after_training(model, batches, names, kv_cache="fp8_e4m3")) == 1
    assert all(scale > 0 for scale in cache_scales(model))
    assert len(cache_scales(model)) == 2 * model.config.num_hidden_layers
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


def test_copies_for_generation_round_as_well():
    model = rounding(tiny_model("llama"))
    assert torch.equal(logits(inference_copy(model, torch.float32)), logits(model))
    assert rounds_inputs(model)
    assert not FusedDecoder.supports(model)
    assert FusedDecoder.supports(without(model))


def test_a_second_format_and_an_unknown_one_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"among fp8_e4m3, int8, found 'int3'; choose one"):
        insert_cache_quantizers(model, format="int3")
    insert_cache_quantizers(model, format="int8")
    with pytest.raises(ValueError, match=r"found one in int8; give it one format"):
        insert_cache_quantizers(model, format="fp8_e4m3")
