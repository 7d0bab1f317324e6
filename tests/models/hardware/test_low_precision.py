"""Optimizer states and weights in few bits: they learn, resume exactly, shrink with their parameters, and are checked."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import nn
from torch.nn import functional as F

from callbacks import AtomicCheckpointIO, QuantizationAwareTraining
from models import SFT
from models.forward import answer_labels, answer_logits
from models.hardware.low_precision import check_rounding
from models.loading.checkpoint import load_student_checkpoint
from models.loading.reference import load_model
from models.quantization.learned_scales import SCALE_RATE, learned_scales
from models.structure.slicing import narrow_parameter
from tests.helpers.same import assert_same
from tests.helpers.tiny import tiny_batch
from tests.helpers.training import Editing, loader, tiny_trainer

optim = pytest.importorskip("torchao.optim")


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """torchao compiles its update once for every shape, which takes seconds each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def module_of(student: str, dtype: str, **settings: Any) -> SFT:
    rounding = dtype == "bfloat16"
    optimizer = partial(optim.AdamW8bit, lr=1e-2, block_size=64, bf16_stochastic_round=rounding)
    return SFT(student, optimizer=optimizer, student_dtype=dtype, generate_tokens=0, **settings)


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return F.cross_entropy(answer_logits(model.eval(), tiny_batch()).float(), answer_labels(tiny_batch())).item()


def fit(folder: Path, student: str, dtype: str, **settings: Any) -> SFT:
    module = module_of(student, dtype)
    precision = "32-true" if dtype == "float32" else "bf16-mixed"
    ckpt_path = settings.pop("ckpt_path", None)
    settings["plugins"] = [AtomicCheckpointIO()]
    tiny_trainer(folder, precision=precision, **settings).fit(module, loader(), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_are_learned_in_float32_and_resume_exactly(dtype: str, student_folder: str, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    def quantization() -> QuantizationAwareTraining:
        return QuantizationAwareTraining(1, observe_steps=1, format="int8_static", learn_scales=True)

    whole = fit(tmp_path, student_folder, dtype, callbacks=[quantization(), Save()])
    assert {p.dtype for p in learned_scales(whole.student)} == {torch.float32}
    assert [float(group["weight_decay"]) for group in whole.optimizers().param_groups] == [0.01, 0]
    main, scales = (float(group["lr"]) for group in whole.optimizers().param_groups)
    assert scales == pytest.approx(SCALE_RATE * main)
    resumed = fit(tmp_path, student_folder, dtype, callbacks=[quantization()], ckpt_path=str(tmp_path / "three.ckpt"))
    assert_same(resumed.state_dict(), whole.state_dict())


def test_bfloat16_weights_cannot_follow_their_scales(student_folder: str, tmp_path: Path) -> None:
    quantization = QuantizationAwareTraining(1, method="gptq", format="int4_g32", learn_scales=True)
    with pytest.raises(ValueError, match="expected float32 weights to follow scales .* found torch.bfloat16"):
        fit(tmp_path, student_folder, "bfloat16", callbacks=[quantization])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns_prunes_and_resumes_exactly(dtype: str, student_folder: str, tmp_path: Path) -> None:
    """Six steps with two pruning edits, and the same again from a checkpoint after the third."""
    saved = tmp_path / "three.ckpt"
    whole = fit(tmp_path, student_folder, dtype, callbacks=[Editing(save_at=3, path=saved)])
    kinds = {type(value) for state in whole.optimizers().state.values() for value in state.values()}
    assert kinds >= {optim.subclass_8bit.OptimState8bit}
    assert {p.dtype for p in whole.student.parameters()} == {getattr(torch, dtype)}
    assert {b.dtype for b in whole.student.model.rotary_emb.buffers()} == {torch.float32}
    resumed = fit(tmp_path, student_folder, dtype, callbacks=[Editing()], ckpt_path=str(saved))
    for (name, tensor), other in zip(
        whole.student.state_dict().items(), resumed.student.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    assert loss_of(whole.student) < 0.7 * loss_of(load_model(student_folder))
    assert loss_of(load_student_checkpoint(saved)[0]) < loss_of(load_model(student_folder))


def test_states_in_8_bits_shrink_with_their_parameter() -> None:
    """Within the step of an 8-bit number, the same moments as before for the rows that stay; small ones become plain."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 96))
    optimizer = optim.AdamW8bit([parameter], lr=1e-2)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    before = {name: optimizer.state[parameter][name].dequantize() for name in ("exp_avg", "exp_avg_sq")}
    for keep, kind in ((torch.arange(0, 64, 1)[16:], "OptimState8bit"), (torch.arange(3, 11), "Tensor")):
        narrow_parameter(parameter, keep, 0, [optimizer])
        for name in before:
            state = optimizer.state[parameter][name]
            before[name] = before[name][keep]
            assert type(state).__name__ == kind
            values = state.dequantize() if kind == "OptimState8bit" else state
            torch.testing.assert_close(values, before[name], rtol=0.1, atol=float(before[name].abs().max()) / 50)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the new states are ones that the optimizer can go on with
    assert torch.isfinite(parameter).all()


def test_states_of_another_kind_are_refused() -> None:
    parameter = nn.Parameter(torch.randn(64, 96))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter]["exp_avg"] = optim.subclass_8bit.OptimState8bit.zeros((64, 96))
    with pytest.raises(ValueError, match="expected optimizer states that are plain tensors or torchao's .* of AdamW"):
        narrow_parameter(parameter, torch.arange(8), 0, [optimizer])


def test_bfloat16_weights_need_stochastic_rounding() -> None:
    weights = [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    with pytest.raises(
        ValueError, match="expected an optimizer that rounds stochastically .* found AdamW; use torchao"
    ):
        check_rounding(torch.optim.AdamW(weights))
    check_rounding(optim.AdamW8bit(weights, bf16_stochastic_round=True))
    check_rounding(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]))


def test_small_updates_survive_in_bfloat16() -> None:
    """What stochastic rounding is for: 400 updates of 1/1000 move a weight of 1 that rounding to nearest leaves alone."""
    ends = {}
    for rounding in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = optim.AdamW8bit([weight], lr=1e-3, weight_decay=0.0, bf16_stochastic_round=rounding)
        for _ in range(400):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends[rounding] = weight.detach().float().mean().item()
    assert ends[False] == 1.0
    assert ends[True] == pytest.approx(0.6, abs=0.03)
