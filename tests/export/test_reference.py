"""How far runtimes may be from a recorded run: what ONNX Runtime's fast kernels do to the inputs of layers with rounded weights."""

import pytest
import torch
from tiny_models import left_padded_prompts, quantized, tiny_model
from torch import Tensor

from export.reference import record
from models.losses import forward_kl
from models.quantization import quantized_linears
from models.quantization.kernels import rounded_in_blocks

PROMPTS = left_padded_prompts()
IDS, MASK = PROMPTS["prompt_ids"], PROMPTS["prompt_mask"]


def test_what_the_rounding_of_kernels_does_to_a_model_is_measured():
    """Against the definition: the model with its quantized layers' inputs rounded, over all tokens of the run."""
    model = quantized(tiny_model(), format="int4_g32")
    reference = record(model, IDS, MASK, decode_steps=3)
    ids_BS, mask_BS = torch.cat([step.input_ids for step in reference.steps], dim=1), reference.steps[-1].attention_mask
    positions = (mask_BS.cumsum(1) - 1).clamp(min=0)

    def logits() -> Tensor:
        return model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions).logits[mask_BS.bool()]

    with torch.no_grad():
        exact_NV = logits()
        for linear in quantized_linears(model).values():
            linear.register_forward_pre_hook(lambda _, inputs: rounded_in_blocks(inputs[0], 32))
        expected = forward_kl(logits(), exact_NV).mean().item()
    assert reference.sensitivity is None
    assert reference.kernel_rounding == pytest.approx(expected, rel=1e-3)
    assert expected > 0


def test_only_layers_of_rounded_weights_count():
    assert record(tiny_model(layers=1), IDS, MASK, decode_steps=1).kernel_rounding is None
    assert record(quantized(tiny_model(layers=1)), IDS, MASK, decode_steps=1).kernel_rounding is None
