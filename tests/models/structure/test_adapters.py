"""LoRA: what is trained, what is recorded, and that no adapter leaves training."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from callbacks import GradualPruning, LoRA, QuantizationAwareTraining
from export.folders.student import save_student
from export.onnx_graph.to_onnx import export_onnx
from export.verify import verify
from models import SFT
from models.architecture import count_parameters
from models.copies import inference_copy
from models.forward import answer_logits
from models.loading.checkpoint import load_student_checkpoint
from models.structure.adapters import has_adapters, merge_adapters, merged, projections
from models.structure.edits import Edit, apply_edit, quantize_decoder
from tests.helpers.tiny import tiny_batch, tiny_folder, tiny_model
from tests.helpers.training import loader, tiny_trainer

pytest.importorskip("peft")

EDIT: Edit = {"op": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "v_proj", "down_proj"]}


def adapted(family: str = "llama") -> Any:
    """A tiny model with adapters that change its answers."""
    model = tiny_model(family)
    apply_edit(model, EDIT)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return answer_logits(model.eval(), tiny_batch())


@pytest.fixture(scope="module")
def run(student_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[SFT, dict[str, Tensor], Path]:
    """Four steps, the weights before them, and the checkpoint after the second."""
    folder = tmp_path_factory.mktemp("lora")
    module = lora_module(student_folder)
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.student.named_parameters()}
    two = lora_module(student_folder)
    fit(two, folder, 2)
    two.trainer.save_checkpoint(folder / "two.ckpt")
    fit(module, folder, 4)
    module.trainer.save_checkpoint(folder / "four.ckpt")
    return module, before, folder


def lora_module(student: str) -> SFT:
    optimizer = partial(torch.optim.AdamW, lr=3e-2)
    return SFT(student, optimizer=optimizer, lr_schedule="constant", generate_tokens=0, gradient_checkpointing=True)


def fit(module: SFT, folder: Path, steps: int, ckpt_path: str | None = None) -> None:
    torch.manual_seed(0)  # of the adapters, as seed_everything does it
    callback = LoRA(rank=4, alpha=8, dropout=0.5, modules=EDIT["modules"])
    tiny_trainer(folder, steps, callbacks=[callback]).fit(module, loader([tiny_batch()] * 4), ckpt_path=ckpt_path)


def test_only_adapters_are_trained(run: tuple[SFT, dict[str, Tensor], Path]) -> None:
    module, before, _ = run
    trained = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    adapters = {name: p for name, p in module.student.named_parameters() if ".lora_" in name}
    assert trained == {id(p) for p in adapters.values()}
    assert len(adapters) == 2 * 2 * 3  # layers, matrices, projections
    assert all(p.abs().max() > 0 for p in adapters.values())  # B starts at 0
    after = {name.replace(".base_layer", ""): p for name, p in module.student.named_parameters()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert count_parameters(module.student) == sum(tensor.numel() for tensor in before.values())


def test_a_checkpoint_resumes_exactly(run: tuple[SFT, dict[str, Tensor], Path], student_folder: str) -> None:
    module, _, folder = run
    resumed = lora_module(student_folder)
    fit(resumed, folder, 4, ckpt_path=str(folder / "two.ckpt"))
    pairs = zip(module.student.state_dict().items(), resumed.student.state_dict().values(), strict=True)
    assert all(torch.equal(tensor, other) for (_, tensor), other in pairs)


def test_the_checkpoints_student_is_merged(run: tuple[SFT, dict[str, Tensor], Path]) -> None:
    module, before, folder = run
    student, _ = load_student_checkpoint(folder / "four.ckpt")
    assert set(dict(student.named_parameters())) == set(before)
    torch.testing.assert_close(logits(student), logits(module.student), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(student), logits(tiny_model()), atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merging_changes_no_logit(family: str) -> None:
    model = adapted(family)
    expected = logits(model)
    assert not torch.allclose(expected, logits(tiny_model(family)), atol=1e-2)
    for plain in (merged(model), inference_copy(model, torch.float32)):
        torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
        assert not has_adapters(plain)
        assert set(plain.state_dict()) == set(tiny_model(family).state_dict())
    assert has_adapters(model)  # copies were merged, the student goes on
    assert torch.equal(logits(model), expected)
    plain = tiny_model(family)
    assert merged(plain) is plain


def test_the_exported_folder_is_plain(tmp_path: Path) -> None:
    from tests.helpers.chat_doubles import byte_tokenizer

    model = adapted()
    save_student(model, byte_tokenizer(), tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=False)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not list((tmp_path / "student").glob("adapter*"))


def test_the_exported_graph_is_the_adapted_student(tmp_path: Path) -> None:
    model = adapted()
    batch = tiny_batch()
    export_onnx(merged(model), tmp_path / "model.onnx", precision="fp32", opset=23)
    checks = verify(merged(model), tmp_path / "model.onnx", batch["prompt_ids"], batch["prompt_mask"], decode_steps=2)
    assert checks and {check.status for check in checks} == {"passed"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            {**EDIT, "modules": ["q_proj", "lm_head"]},
            "expected LoRA modules among q_proj, .*, found lm_head; change them",
        ),
        ({**EDIT, "modules": []}, "found none"),
    ],
)
def test_modules_that_are_not_there(edit: Edit, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        apply_edit(model, edit)
    assert not has_adapters(model)


def test_projections_of_another_family_are_refused() -> None:
    model = tiny_model("phi3")
    with pytest.raises(
        ValueError, match="among qkv_proj, o_proj, gate_up_proj, down_proj, found q_proj, v_proj; change"
    ):
        apply_edit(model, EDIT)
    assert not has_adapters(model)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_by_default_every_projection_gets_an_adapter(family: str, tmp_path: Path) -> None:
    module = SFT(tiny_folder(tmp_path / "student", family), lr_schedule="constant", generate_tokens=0)
    tiny_trainer(tmp_path, 1, callbacks=[LoRA(rank=2)]).fit(module, loader([tiny_batch()]))
    adapted_ones = {name.split(".lora_")[0] for name, _ in module.student.named_parameters() if ".lora_" in name}
    assert len(adapted_ones) == 2 * len(projections(merged(module.student)))
    assert {name.rpartition(".")[2] for name in adapted_ones} == set(projections(merged(module.student)))


def test_no_surgery_on_a_student_with_adapters() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="expected a student without LoRA adapters for narrow_mlp"):
        apply_edit(model, {"op": "narrow_mlp", "layer": 0, "keep": [0, 1]})
    with pytest.raises(ValueError, match="expected a student without LoRA adapters, found one that has them"):
        apply_edit(model, EDIT)
    quantized = tiny_model()
    apply_edit(quantized, quantize_decoder(quantized))
    with pytest.raises(
        ValueError, match="expected linear layers for LoRA, found q_proj of layer 0 as a FakeQuantizedLinear"
    ):
        apply_edit(quantized, EDIT)
    apply_edit(merge_adapters(model), {"op": "narrow_mlp", "layer": 0, "keep": [0, 1]})  # merged, it may be cut


@pytest.mark.parametrize("other", [GradualPruning(0.5, start_step=1, end_step=1), QuantizationAwareTraining(2)])
def test_no_pruning_or_quantization_in_the_same_run(other: Any, student_folder: str, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[LoRA(), other])
    with pytest.raises(ValueError, match=f"expected LoRA without {type(other).__name__}, found both"):
        trainer.fit(lora_module(student_folder), loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "expected LoRA.rank between 1 and"),
        ({"alpha": 0}, "expected LoRA.alpha above 0, found 0"),
        ({"dropout": 1.0}, r"expected LoRA.dropout between 0 and 1 \(1 excluded\), found 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)
