"""Students with learned scales: their graphs, folders and checkpoints hold what was trained, and nothing of how it was."""

from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor
from transformers import PreTrainedModel

from callbacks import QuantizationAwareTraining
from export.folders.student import load_student, save_student
from export.onnx_graph.to_onnx import export_onnx
from export.onnx_graph.trace import DecoderWithCache, _dynamic_shapes, _example
from export.verify import verify
from models import SFT
from models.architecture import count_parameters
from models.copies import inference_copy
from models.generation.decoder import decoder_for
from models.loading.checkpoint import load_student_checkpoint
from models.quantization import quantized_linears
from models.quantization.learned_scales import learn_scales, learned_scales, round_learned_scales
from tests.helpers.tiny_models import left_padded_prompts, quantized, tiny_model, tiny_tokenizer
from tests.helpers.training import loader, tiny_trainer

pytestmark = pytest.mark.long

PROMPTS = left_padded_prompts()
FORMATS = ["fp8_e4m3", "int8", "int8_static", "int4_g32_zp"]


def learned(format: str, **settings: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student whose scales have moved, and one with these very scales that were never learned."""
    student, frozen = (quantized(tiny_model(**{"layers": 1, **settings}), format=format) for _ in range(2))  # type: ignore[arg-type]
    learn_scales(student, weights_follow=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learned_scales(student):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    round_learned_scales(student)
    assert not torch.equal(logits(student), logits(frozen))
    for ours, theirs in zip(quantized_linears(student).values(), quantized_linears(frozen).values(), strict=True):
        theirs.weight.data.copy_(ours.weight)  # it has followed its scales
        for quantizer, other in zip(ours.quantizers(), theirs.quantizers(), strict=True):
            other.set_scales(quantizer.scale, quantizer.zero_point)
    return student, frozen


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(PROMPTS["prompt_ids"], attention_mask=PROMPTS["prompt_mask"]).logits


@pytest.mark.parametrize("format", FORMATS)
def test_the_graph_is_that_of_a_student_with_these_scales(format: str, tmp_path: Path) -> None:
    student, frozen = learned(format)
    assert torch.equal(logits(student), logits(frozen))
    files = []
    for name, model in (("learned", student), ("frozen", frozen)):
        export_onnx(model, tmp_path / name / "model.onnx", precision=format)  # type: ignore[arg-type]
        files.append(onnx.load(tmp_path / name / "model.onnx").graph)
    assert [(n.op_type, n.input, n.output) for n in files[0].node] == [
        (n.op_type, n.input, n.output) for n in files[1].node
    ]
    for ours, theirs in zip(files[0].initializer, files[1].initializer, strict=True):
        assert ours.name == theirs.name
        assert numpy_helper.to_array(ours).tobytes() == numpy_helper.to_array(theirs).tobytes()
    checks = verify(student, tmp_path / "learned/model.onnx", *PROMPTS.values(), decode_steps=2)
    assert [check.status for check in checks] == ["passed"] * 3, checks


def test_torch_export_sees_the_one_operator() -> None:
    student, frozen = learned("fp8_e4m3")

    def operators(model: PreTrainedModel) -> list[str]:
        arguments, shapes = _example(model, torch.float32), _dynamic_shapes(1)
        with torch.no_grad():
            program = torch.export.export(DecoderWithCache(model), arguments, dynamic_shapes=shapes, strict=False)
        return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]

    assert operators(student) == operators(frozen)
    assert operators(student).count("potstill.fake_quantize.default") == 14


@pytest.mark.parametrize("format", FORMATS)
def test_the_folder_gives_the_same_logits(format: str, tmp_path: Path) -> None:
    student, frozen = learned(format)
    save_student(student, tiny_tokenizer(), tmp_path / "student")
    loaded, _ = load_student(str(tmp_path / "student"))
    assert torch.equal(logits(loaded), logits(student))
    assert not learned_scales(loaded)
    assert count_parameters(student) == count_parameters(frozen) == count_parameters(loaded)


def test_the_compressed_folder_holds_learned_scales(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from safetensors.torch import load_file

    from export.folders.compressed import save_compressed

    student, _ = learned("int4_g32")
    save_compressed(student, tiny_tokenizer(), tmp_path / "compressed")
    stored = load_file(tmp_path / "compressed/model.safetensors")
    for name, linear in quantized_linears(student).items():
        assert torch.equal(stored[f"{name}.weight_scale"].float(), linear.weight_quantizer.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_that_generate_round_with_learned_scales(dtype: torch.dtype) -> None:
    student, frozen = learned("fp8_e4m3")
    copies = [inference_copy(model, dtype) for model in (student, frozen)]
    assert torch.equal(logits(copies[0]), logits(copies[1]))
    firsts = [
        decoder_for(model, dtype).prefill(PROMPTS["prompt_ids"], PROMPTS["prompt_mask"], 1)
        for model in (student, frozen)
    ]
    assert torch.equal(firsts[0], firsts[1])


@pytest.mark.parametrize("format", ["fp8_e4m3", "int4_g32_zp"])
def test_from_training_to_checkpoint_to_folder(format: str, student_folder: str, tmp_path: Path) -> None:
    module = SFT(student_folder, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    quantization = QuantizationAwareTraining(1, observe_steps=1, format=format, learn_scales=True)  # type: ignore[arg-type]
    trainer = tiny_trainer(tmp_path, callbacks=[quantization], gradient_clip_val=1.0)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trained = logits(module.student.eval())
    restored, _ = load_student_checkpoint(tmp_path / "last.ckpt")
    assert len(learned_scales(restored)) == len(learned_scales(module.student)) > 0
    assert torch.equal(logits(restored), trained)
    save_student(restored, module.tokenizer, tmp_path / "student")
    loaded, _ = load_student(str(tmp_path / "student"))
    assert torch.equal(logits(loaded), trained)
