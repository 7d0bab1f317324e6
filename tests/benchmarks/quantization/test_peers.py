"""The peers of the quantization study round what we think, where we think, and nothing else."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks.quantization import peers as quantization_peers
from benchmarks.quantization.peers import Peer
from models.architecture import decoder_layers
from tests.helpers.tiny import PAIRS, tiny_batch, tiny_model

BATCHES = [tiny_batch(PAIRS[3:]), tiny_batch(PAIRS[:3])]
GROUP = 32


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model(hidden_size=64, intermediate_size=96, head_dim=16).requires_grad_(False)


def quantized(model: PreTrainedModel, peer: Peer) -> PreTrainedModel:
    pytest.importorskip({"nvidia-modelopt": "modelopt.torch.quantization", "torchao": "torchao"}[peer.package])
    student = copy.deepcopy(model)
    peer.quantize(student, BATCHES)
    return student


def first_linear(model: PreTrainedModel) -> nn.Module:
    """Its inputs are those of the unquantized model."""
    return decoder_layers(model)[0].attention.q_proj


@torch.no_grad()
def inputs_and_outputs(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """Of the first linear layer, for each batch."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = first_linear(model).register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    for batch in BATCHES:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    return [x for x, _ in seen], [output for _, output in seen]


def fp8(x: Tensor, amax: Tensor) -> Tensor:
    return (x * (448 / amax)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * (amax / 448)


def integers(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (x * (1 / scale)).round().clamp(
        low, high
    ) * scale  # torchao's largest values lie between two codes: no division


def by_row(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def in_groups(rounded: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda w, _: rounded(w.unflatten(1, (-1, GROUP))).flatten(1)


MODELOPT, TORCHAO = "nvidia-modelopt", "torchao"
Rounding = Callable[[Tensor, Tensor], Tensor]  # of a tensor whose kind has this largest magnitude
AS_IT_IS: Rounding = lambda x, amax: x  # noqa: E731
ROUNDINGS: list[tuple[Peer, Rounding, Rounding]] = [
    (Peer("fp8_e4m3", MODELOPT, "FP8_DEFAULT_CFG"), fp8, fp8),
    (
        Peer("fp8_e4m3_per_channel", MODELOPT, "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
        lambda w, _: fp8(w, by_row(w)),
        lambda x, _: fp8(x, by_row(x)),
    ),
    (
        Peer("int8_static", MODELOPT, "INT8_DEFAULT_CFG"),
        lambda w, _: integers(w, by_row(w) / 127, -128, 127),
        lambda x, amax: integers(x, amax / 127, -128, 127),
    ),
    (
        Peer("int4_g32", MODELOPT, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
        in_groups(lambda w: integers(w, by_row(w) / 7, -8, 7)),
        AS_IT_IS,
    ),
    (
        Peer("int8", TORCHAO, "Int8DynamicActivationInt8WeightConfig"),
        lambda w, _: integers(w, by_row(w) / 127.5, -128, 127),
        lambda x, _: integers(x, by_row(x) / 127.5, -128, 127),
    ),
    (
        Peer("int8_weight_only", TORCHAO, "Int8WeightOnlyConfig"),
        lambda w, _: integers(w, by_row(w) / 127.5, -128, 127),
        AS_IT_IS,
    ),
    (
        Peer("int4_g32", TORCHAO, "IntxWeightOnlyConfig"),
        in_groups(lambda w: integers(w, by_row(w) / 7.5, -8, 7)),
        AS_IT_IS,
    ),
]
SCALED = [Peer("int4_g32", MODELOPT, "INT4_AWQ_CFG"), Peer("int8_static", MODELOPT, "INT8_SMOOTHQUANT_CFG")]
GPTQ = Peer("int4_g32", MODELOPT, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "gptq")


@pytest.mark.parametrize(("peer", "weights", "inputs"), ROUNDINGS, ids=lambda value: getattr(value, "name", ""))
def test_what_is_rounded(model: PreTrainedModel, peer: Peer, weights: Rounding, inputs: Rounding) -> None:
    student = quantized(model, peer)
    calibrated, plain = inputs_and_outputs(model)
    amax = torch.stack([x.abs().amax() for x in calibrated])
    assert amax[1] > amax[0]  # the last batch counts, too
    weight_OI = first_linear(model).weight
    rounded_OI = weights(weight_OI, weight_OI.abs().amax())
    for x, output, dense in zip(*inputs_and_outputs(student), plain, strict=True):
        expected = F.linear(inputs(x, amax.max()), rounded_OI)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        assert (expected - dense).abs().max() > 100 * (expected - output).abs().max()


@pytest.mark.parametrize("peer", SCALED, ids=lambda peer: peer.name)
def test_scaled_weights_on_scaled_inputs(model: PreTrainedModel, peer: Peer) -> None:
    linear, before_OI = first_linear(quantized(model, peer)), first_linear(model).weight
    factor_I = linear.input_quantizer.pre_quant_scale
    assert factor_I.max() > 1.01 * factor_I.min()
    torch.testing.assert_close(linear.weight * factor_I, before_OI)
    assert linear.input_quantizer.is_enabled == (peer.format == "int8_static")
    grouped = linear.weight.unflatten(1, (-1, GROUP if "int4" in peer.format else 64))
    high = 7 if "int4" in peer.format else 127
    expected = integers(grouped, by_row(grouped) / high, -high - 1, high).flatten(1)
    torch.testing.assert_close(linear.weight_quantizer(linear.weight), expected)


def test_gptq_changes_weights_and_stays_on_the_grid_of_the_largest(model: PreTrainedModel) -> None:
    linear, before_OI = first_linear(quantized(model, GPTQ)), first_linear(model).weight
    values_OI = linear.weight_quantizer(linear.weight)
    scale = by_row(before_OI.unflatten(1, (-1, GROUP))) / 7
    codes = values_OI.unflatten(1, (-1, GROUP)) / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    nearest = integers(before_OI.unflatten(1, (-1, GROUP)), scale, -8, 7).flatten(1)
    x = torch.cat([x.flatten(0, 1) for x in inputs_and_outputs(model)[0]])
    assert F.linear(x, values_OI - before_OI).norm() < F.linear(x, nearest - before_OI).norm()


@pytest.mark.parametrize("peer", [*(row[0] for row in ROUNDINGS), *SCALED, GPTQ], ids=lambda peer: peer.name)
def test_which_layers_are_quantized(model: PreTrainedModel, peer: Peer) -> None:
    student = quantized(model, peer)
    projections = {f"layers.{i}.{name}" for i in range(2) for name, _ in named_linears(model, i)}
    if peer.package == "torchao":
        found = {
            name for name, m in student.base_model.named_modules() if "Tensor" in type(getattr(m, "weight", 0)).__name__
        }
    else:
        quantizers = [name for name, m in student.base_model.named_modules() if getattr(m, "is_enabled", False)]
        found = {name.rpartition(".")[0] for name in quantizers}
    assert found == projections and len(projections) == 14
    assert type(student.get_output_embeddings()) is nn.Linear
    assert torch.equal(student.get_output_embeddings().weight, model.get_output_embeddings().weight)
    tokens = torch.arange(9)
    assert torch.equal(student.get_input_embeddings()(tokens), model.get_input_embeddings()(tokens))


def named_linears(model: PreTrainedModel, layer: int) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in decoder_layers(model)[layer].block.named_modules() if isinstance(m, nn.Linear)]


def test_nothing_is_printed(model: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    quantized(model, SCALED[0])
    assert capsys.readouterr().out == ""


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_peers, "find_spec", lambda _: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"expected the package `nvidia-modelopt`.*`pip install -e .\[bench\]`"
    ):
        SCALED[0].check_installed()
