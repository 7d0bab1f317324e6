"""Activation checkpointing: fewer kept tensors, the same gradients, off wherever nothing is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from models import StudentModule
from models.copies import inference_copy
from models.forward import answer_logits, checkpoint_activations
from models.quantization import freeze_scales
from models.structure.edits import apply_edit, quantize_decoder
from tests.helpers.tiny import tiny_batch, tiny_model


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Bytes of all distinct tensors that autograd keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def step(checkpointed: bool, **settings: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    model = tiny_model(**settings).train()
    if checkpointed:
        checkpoint_activations(model)
    torch.manual_seed(3)  # of dropout
    with saved_bytes() as sizes:
        loss = answer_logits(model, tiny_batch()).square().mean()
    kept = sum(sizes.values())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, kept


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_same_loss_and_gradients_from_fewer_kept_tensors(dropout: float) -> None:
    """With dropout, the second pass through a layer must draw what the first one drew."""
    loss, grads, kept = step(False, attention_dropout=dropout)
    checkpointed_loss, checkpointed_grads, checkpointed_kept = step(True, attention_dropout=dropout)
    assert torch.equal(loss, checkpointed_loss)
    torch.testing.assert_close(checkpointed_grads, grads)
    assert checkpointed_kept < kept / 2
    if dropout:
        assert not torch.equal(loss, step(False)[0]), "dropout did nothing"


def test_learned_scales_have_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny_model().train()
        apply_edit(model, quantize_decoder(model, "int8_static"))
        answer_logits(model, tiny_batch())
        freeze_scales(model)
        apply_edit(model, {"op": "learn_scales", "weights_follow": False})
        if checkpointed:
            checkpoint_activations(model)
        answer_logits(model, tiny_batch()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_a_copy_for_inference_carries_none() -> None:
    model = tiny_model().train()
    checkpoint_activations(model)
    duplicate = inference_copy(model, torch.float32)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in duplicate.modules())
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_the_setting_reaches_the_student(student_folder: str) -> None:
    for wanted in (False, True):
        module = StudentModule(student_folder, gradient_checkpointing=wanted)
        module.configure_model()
        assert all(layer.gradient_checkpointing is wanted for layer in module.student.model.layers)
