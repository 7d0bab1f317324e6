"""Memory that is counted on tensors without data: that of the same step on real ones, and what is left out makes less."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from models.hardware.attention import use_attention
from models.losses import Objective
from models.planning import memory
from models.planning.memory import StepSettings, Tally, sizes_of, step_bytes

STEP = StepSettings(batch_size=3, length=40, answer_share=0.5, device="cpu")
ALONE = replace(STEP, objective=Objective({"cross_entropy": 1.0}))


def config(layers: int = 3, family: str = "llama", **settings: int) -> PretrainedConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    defaults = {**sizes, "vocab_size": 500, "head_dim": 16, "num_hidden_layers": layers, "pad_token_id": 0}
    return AutoConfig.for_model(family, **{**defaults, **settings})


def made(of: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(of, dtype=dtype)
    use_attention(model)
    return model


@pytest.mark.parametrize(
    "changes", [{}, {"mixed": False}, {"lora_rank": 4}, {"objective": Objective({"jsd": 1.0})}], ids=str
)
def test_a_step_without_data_takes_what_one_with_data_takes(changes: dict[str, Any]) -> None:
    settings, ours, theirs = replace(STEP, **changes), config(), config(5, hidden_size=80)
    student, teacher = made(ours, torch.float32), made(theirs, torch.bfloat16).eval().requires_grad_(False)
    if settings.lora_rank:
        modules = memory.projections(student)
        memory.insert_adapters(student, modules=modules, rank=settings.lora_rank, alpha=1.0, dropout=0.0)
    with Tally() as tally:
        tally.note(list(student.parameters()), list(teacher.parameters()))
        before = tally.now
        kept, loss_most = memory._forward(student.train(), teacher, memory._batch(settings), settings, tally)
        added = tally.most - before
    found = step_bytes(ours, theirs, settings)
    assert found["activations"] == pytest.approx(kept - before, rel=0.01)
    assert found["logits"] == pytest.approx(loss_most - kept, rel=0.02)
    fixed = found["weights"] + found["teacher"] + found["moments"]
    assert found["peak"] - fixed == pytest.approx(memory.HEAP["cpu"] * max(added, found["gradients"]), rel=0.02)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert found["weights"] == 4 * sum(p.numel() for p in student.parameters())
    assert found["teacher"] == 2 * sum(p.numel() for p in teacher.parameters())
    assert (found["gradients"], found["moments"]) == (4 * trained, 8 * trained)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}, {"checkpointing": True}], ids=str)
def test_a_deep_model_is_counted_at_two_depths(changes: dict[str, Any]) -> None:
    ours, theirs, settings = config(16), config(13, hidden_size=80), replace(STEP, **changes)
    found, (kept, in_loss, most) = step_bytes(ours, theirs, settings), memory._passing_bytes(ours, theirs, settings)
    assert found["activations"] == pytest.approx(kept, rel=0.01)
    assert found["logits"] == pytest.approx(in_loss - kept, rel=0.01)
    passing = found["peak"] - found["weights"] - found["teacher"] - found["moments"]
    assert passing == pytest.approx(memory.HEAP["cpu"] * max(most, found["gradients"]), rel=0.05)


def test_overlays_take_less() -> None:
    ours, theirs = config(), config(5, hidden_size=80)
    plain = step_bytes(ours, theirs, STEP)

    def changed(**settings: Any) -> dict[str, int]:
        return step_bytes(ours, theirs, replace(STEP, **settings))

    assert changed(checkpointing=True)["activations"] < plain["activations"] / 2
    assert changed(lora_rank=1)["gradients"] < plain["gradients"] / 5
    assert changed(optimizer="AdamW8bit")["moments"] < plain["moments"] / 3
    assert changed(student_dtype="bfloat16")["weights"] == plain["weights"] / 2
    assert changed(teacher_dtype="int8")["teacher"] < plain["teacher"]
    assert step_bytes(ours, None, ALONE)["teacher"] == 0


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_model(tied: bool) -> None:
    found = sizes_of(config(tie_word_embeddings=tied), lora_rank=4)
    assert found.parameters == AutoModelForCausalLM.from_config(config(tie_word_embeddings=tied)).num_parameters()
    assert found.tied == tied
    assert found.trained < found.parameters / 3
    assert found.head == 500 * 64
    assert found.cached == 3 * 2 * 2 * 16
    assert found.grams == 64**2 + 64**2 + 64**2 + 96**2


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "mistral"])
def test_every_family_is_counted(family: str) -> None:
    assert step_bytes(config(family=family), None, ALONE)["activations"] > 0
