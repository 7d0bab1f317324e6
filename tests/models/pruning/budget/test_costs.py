"""Counts from shapes against counts on models: parameters, and FLOPs as torch's counter sees them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from models.architecture import CACHE, FAMILIES, count_parameters
from models.pruning.budget.costs import flops, parameters
from models.structure.shape import Shape, shape_of, sliced
from tests.helpers.masking import cut_model

UNEVEN = {("neurons", 0): 16, ("query_heads", 1): 4, ("kv_groups", 2): 3, ("hidden", 0): 24}


def dense_and_cut(family: str, **settings: object) -> list[tuple[PreTrainedModel, Shape]]:
    model = cut_model(family, **settings)
    shapes = [shape_of(model), shape_of(model).keeping(UNEVEN), shape_of(model).keeping({("layer", 2): 0})]
    return [(sliced(model, shape), shape) for shape in shapes]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters(family: str, tied: bool) -> None:
    for model, shape in dense_and_cut(family, tie_word_embeddings=tied):
        assert parameters(shape) == count_parameters(model)


def test_parameters_with_every_bias_there_is() -> None:
    for model, shape in dense_and_cut("llama", attention_bias=True, mlp_bias=True):
        wiring = shape.wiring
        assert wiring.qkv_bias
        assert wiring.o_bias
        assert wiring.gate_up_bias
        assert wiring.down_bias
        assert parameters(shape) == count_parameters(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops(family: str) -> None:
    for model, shape in dense_and_cut(family):
        assert flops(shape, batch=2, new=5) == counted_flops(model, batch=2, new=5, past=0)
        assert flops(shape, batch=3, new=1, past=6) == counted_flops(model, batch=3, new=1, past=6)


@torch.no_grad()
def counted_flops(model: PreTrainedModel, *, batch: int, new: int, past: int) -> int:
    """All but the angles of rotary embeddings, which transformers computes as a product of positions and frequencies."""
    model.set_attn_implementation("eager")
    cache = DynamicCache()  # without a config: no layer forgets what its window does not show
    if past:
        model(input_ids=torch.ones(batch, past, dtype=torch.long), **{CACHE: cache})
    with FlopCounterMode(display=False, depth=None) as counter:
        model(input_ids=torch.ones(batch, new, dtype=torch.long), **{CACHE: cache})
    rotary = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary
