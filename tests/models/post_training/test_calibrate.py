"""A quantized model: everything frozen, weights on their grids, statistics of the inputs that the layers really have."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.architecture import FAMILIES, decoder_layers
from models.calibration.observe import hooked
from models.forward import answer_logits
from models.losses import forward_kl
from models.post_training import calibrate as module
from models.post_training import weight_solver
from models.post_training.calibrate import quantize_after_training
from models.post_training.settings import PostTrainingQuantization
from models.quantization import FORMATS, FakeQuantizedLinear, InputQuantizer, quantized_linears
from models.structure.edits import replay
from tests.helpers.tiny import tiny_batch, tiny_model

BATCHES = [tiny_batch(), tiny_batch([("one two three four", "five six"), ("?", "!")])]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32}
FAR = {"int8": 0.02, "fp8_e4m3": 0.2, "int4": 2.0}  # nats; random weights are sharp
DIVISIBLE = [name for name in FORMATS if not name.startswith(("int8_g128", "int4_g128", "int8_g64", "int4_g64"))]


def quantized(model: PreTrainedModel, format: str | dict[str, str] = "fp8_e4m3", **settings: Any) -> PreTrainedModel:
    quantize_after_training(model, BATCHES, format, PostTrainingQuantization(**settings))
    return model


@torch.no_grad()
def kl(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    values = [forward_kl(answer_logits(model, batch), answer_logits(dense, batch)) for batch in BATCHES]
    return float(torch.cat(values).mean())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("method", ["nearest", "gptq", "quantease"])
def test_every_format_ends_frozen_and_on_its_grid(format: str, method: str) -> None:
    dense = tiny_model(**SIZES | ({} if format in DIVISIBLE else {"hidden_size": 128}))
    model = quantized(copy.deepcopy(dense), format=format, method=method)
    linears = quantized_linears(model)
    assert len(linears) == 14
    for linear in linears.values():
        assert linear.format == format
        assert all(quantizer.frozen for quantizer in linear.quantizers())
        assert torch.equal(linear.weight_quantizer(linear.weight), linear.weight)
    assert not model.training
    assert 0 < kl(model, dense) < FAR[FORMATS[format].weight.numbers]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["int8", "int8_static"])
def test_every_family_stays_near_the_dense_model(family: str, format: str) -> None:
    dense = tiny_model(family)
    model = quantized(copy.deepcopy(dense), format=format)
    assert all(quantizer.frozen for linear in quantized_linears(model).values() for quantizer in linear.quantizers())
    assert 0 < kl(model, dense) < 0.02


@pytest.mark.parametrize("method", ["gptq", "quantease"])
def test_solvers_beat_rounding_to_nearest(method: str) -> None:
    dense = tiny_model(**SIZES)
    plain = quantized(copy.deepcopy(dense), format="int4_g32", method="nearest", smoothing=())
    solved = quantized(copy.deepcopy(dense), format="int4_g32", method=method, smoothing=())
    assert kl(solved, dense) < 0.8 * kl(plain, dense)


def inputs_of(model: PreTrainedModel) -> dict[FakeQuantizedLinear, Tensor]:
    """What each quantized layer of a finished model is given at valid tokens, before its quantizer."""
    seen: dict[FakeQuantizedLinear, list[Tensor]] = {linear: [] for linear in quantized_linears(model).values()}
    masks = [batch["attention_mask"].bool() for batch in BATCHES]

    def note(linear: FakeQuantizedLinear, inputs: tuple[Tensor, ...]) -> None:
        seen[linear].append(inputs[0][masks[len(seen[linear])]])

    with torch.no_grad(), hooked(linear.register_forward_pre_hook(note) for linear in seen):
        for batch in BATCHES:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return {linear: torch.cat(inputs) for linear, inputs in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizers_have_observed_what_the_layers_are_given(family: str) -> None:
    """Of the quantized layers before them, valid tokens only."""
    model = quantized(tiny_model(family), format="int8_static", method="nearest")
    for linear, input_SI in inputs_of(model).items():
        assert isinstance(linear.input_quantizer, InputQuantizer)
        torch.testing.assert_close(linear.input_quantizer.amax, input_SI.abs().amax())
        assert linear.input_quantizer.histogram.sum() == input_SI.numel()


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3", "int8_weight_only"])
def test_solvers_are_given_the_gram_matrix_of_the_rounded_inputs(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grams: list[Tensor] = []

    def spy(weight_OI: Tensor, gram_II: Tensor, *args: Any, **kwargs: Any) -> Any:
        grams.append(gram_II.clone())
        return original(weight_OI, gram_II, *args, **kwargs)

    original = weight_solver.gptq
    monkeypatch.setattr(weight_solver, "gptq", spy)
    model = quantized(tiny_model(), format=format, sensitive=False)
    for gram_II, (linear, input_SI) in zip(grams, inputs_of(model).items(), strict=True):
        rounded_SI = input_SI if linear.input_quantizer is None else linear.input_quantizer(input_SI)
        torch.testing.assert_close(gram_II, (rounded_SI.T @ rounded_SI).double(), rtol=1e-3, atol=1e-3)


def test_tokens_count_by_what_the_predictions_owe_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of 0 for all tokens but those of one sample leaves the statistics of that sample."""
    alone = tiny_model()
    settings = PostTrainingQuantization(smoothing=())
    quantize_after_training(
        alone,
        [{name: BATCHES[1][name][:1] for name in ("input_ids", "attention_mask")}],
        "int8_weight_only",
        replace(settings, sensitive=False),
    )

    def only_the_first(model: PreTrainedModel, batch: dict[str, Tensor], *, seed: int) -> list[list[Tensor]]:
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        weight_BT = batch["attention_mask"] * torch.tensor([[1.0], [0.0]])
        return [[weight_BT] * 4, [weight_BT] * 4]

    monkeypatch.setattr(module, "token_weights", only_the_first)
    both = tiny_model()
    quantize_after_training(both, BATCHES[1:], "int8_weight_only", settings)
    for one, other in zip(quantized_linears(alone).values(), quantized_linears(both).values(), strict=True):
        assert (one.weight != other.weight).float().mean() < 0.01  # sums of other lengths are rounded otherwise


@pytest.mark.parametrize(
    ("format", "method", "smooths"),
    [
        ("int8", "gptq", True),
        ("int8_static", "nearest", True),
        ("fp8_e4m3", "gptq", False),
        ("fp8_e4m3_per_channel", "nearest", False),
        ("int8_weight_only", "nearest", True),
        ("int8_weight_only", "quantease", True),
        ("int8_g32", "gptq", True),
        ("int4_g32", "nearest", True),
        ("int4_g32", "quantease", False),
    ],
)
def test_smoothing_is_done_where_it_helps(format: str, method: Any, smooths: bool) -> None:
    dense, model = tiny_model(), quantized(tiny_model(), format=format, method=method)
    norms = [[norm for layer in decoder_layers(m) for norm in layer.stream_norms] for m in (dense, model)]
    changed = [not torch.equal(one.weight, other.weight) for one, other in zip(*norms, strict=True)]
    assert any(changed) == smooths
    never = quantized(tiny_model(), format=format, method=method, smoothing=())
    for layer, other in zip(decoder_layers(dense), decoder_layers(never), strict=True):
        assert torch.equal(layer.stream_norms[0].weight, other.stream_norms[0].weight)


def test_a_replayed_edit_takes_the_state() -> None:
    model = tiny_model()
    edits = quantize_after_training(model, BATCHES, "fp8_e4m3")
    fresh = tiny_model(seed=1)
    replay(fresh, edits)
    fresh.load_state_dict(model.state_dict())
    for batch in BATCHES:
        assert torch.equal(answer_logits(fresh.eval(), batch), answer_logits(model, batch))


def test_progress_is_told() -> None:
    told: list[int] = []
    nearest = PostTrainingQuantization(method="nearest")
    quantize_after_training(tiny_model(), BATCHES, "int8", nearest, on_layer=told.append)
    assert told == [layer.index for layer in decoder_layers(tiny_model())]


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one calibration batch"):
        quantize_after_training(tiny_model(), [], "int8")


def test_a_quantized_model_is_refused() -> None:
    model = quantized(tiny_model(), method="nearest")
    with pytest.raises(ValueError, match="expected linear layers to quantize"):
        quantized(model)


MIXED = {
    "model.layers.0.self_attn.q_proj": "int8_static",
    "model.layers.0.self_attn.k_proj": "int8_weight_only",
    "model.layers.0.self_attn.v_proj": "int8",
    "model.layers.0.mlp.down_proj": "int4_g32",
    "model.layers.1.mlp.up_proj": "int8_static",
}


@pytest.mark.parametrize("method", ["nearest", "quantease"])
def test_each_projection_may_have_a_format_of_its_own(method: str) -> None:
    dense, model = tiny_model(**SIZES), tiny_model(**SIZES)
    quantized(model, MIXED | {"model.layers.1.mlp.gate_proj": "none"}, method=method)
    assert {name: linear.format for name, linear in quantized_linears(model).items()} == MIXED
    for linear in quantized_linears(model).values():
        assert all(quantizer.frozen for quantizer in linear.quantizers())
        assert torch.equal(linear.weight_quantizer(linear.weight), linear.weight)
    assert 0 < kl(model, dense) < FAR["int4"]


def test_in_a_mixture_every_solver_is_given_the_inputs_as_its_layer_rounds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grams: dict[int, Tensor] = {}

    def spy(weight_OI: Tensor, gram_II: Tensor, *args: Any, **kwargs: Any) -> Any:
        grams[weight_OI.data_ptr()] = gram_II.clone()
        return original(weight_OI, gram_II, *args, **kwargs)

    original = weight_solver.gptq
    monkeypatch.setattr(weight_solver, "gptq", spy)
    model = quantized(tiny_model(**SIZES), MIXED, sensitive=False)
    for linear, input_SI in inputs_of(model).items():
        rounded_SI = input_SI if linear.input_quantizer is None else linear.input_quantizer(input_SI)
        gram_II = grams[linear.weight.data_ptr()]
        torch.testing.assert_close(gram_II, (rounded_SI.T @ rounded_SI).double(), rtol=1e-3, atol=1e-3)


def test_layers_that_stay_as_they_are_are_not_smoothed() -> None:
    dense = tiny_model(**SIZES)
    model = quantized(tiny_model(**SIZES), {"model.layers.1.mlp.down_proj": "int8"})
    changed = [
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, dense.state_dict().get(name, value))
    ]
    assert set(changed) <= {"model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"}
