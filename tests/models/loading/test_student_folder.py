"""Students that no config.json describes: the same bits after a folder, and one sentence for a folder that is damaged."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, configuration_utils

from export.folders.student import save_student
from models.architecture import FAMILIES
from models.loading.reference import load_model, load_tokenizer
from models.loading.student_folder import STRUCTURE_FILE, why_not_plain
from models.structure.edits import apply_edit, replay
from models.structure.shape import LayerShape, shape_of
from tests.helpers.chat_doubles import byte_tokenizer
from tests.helpers.tiny import tiny_batch, tiny_model

CUTS = [
    {"op": "narrow_mlp", "layer": 1, "keep": [3, 7, 9]},
    {"op": "narrow_kv_groups", "layer": 2, "keep": [1]},
    {"op": "narrow_query_heads", "layer": 1, "keep": [0, 2, 3, 4, 5, 6]},
    {"op": "drop_layers", "layers": [0]},
    {"op": "narrow_hidden", "keep": list(range(0, 32, 2))},
]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tiny_batch()["input_ids"]).logits


def cut_student(family: str, **settings: object) -> PreTrainedModel:
    """Two layers: 3 neurons and 6 heads in 2 groups; 48 neurons and 4 heads in 1 group."""
    model = tiny_model(family, num_hidden_layers=3, num_attention_heads=8, **settings)
    replay(model, CUTS)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_student(cut_student("llama"), byte_tokenizer(), tmp_path / "student")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_in_every_family(family: str, tied: bool, tmp_path: Path) -> None:
    student = cut_student(family, tie_word_embeddings=tied)
    save_student(student, byte_tokenizer(), tmp_path / "student")
    loaded = load_model(str(tmp_path / "student"))
    assert torch.equal(logits(loaded), logits(student))
    assert shape_of(loaded).layers == (LayerShape(3, 6, 2), LayerShape(48, 4, 1))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    assert (loaded.config.model_type, type(loaded)) == (student.config.model_type, type(student))
    assert (loaded.config.to_dict() | {"architectures": None, "dtype": None}) == (
        student.config.to_dict() | {"architectures": None, "dtype": None}
    )


def test_groups_of_different_sizes_in_one_model(tmp_path: Path) -> None:
    """3 groups of 2 heads and 2 groups of 4: the model with room for both has 3 groups of 4."""
    student = tiny_model("qwen2", num_attention_heads=12, num_key_value_heads=3)
    apply_edit(student, {"op": "narrow_query_heads", "layer": 0, "keep": [0, 3, 4, 5, 8, 9]})
    apply_edit(student, {"op": "narrow_kv_groups", "layer": 1, "keep": [0, 2]})
    save_student(student, byte_tokenizer(), tmp_path / "student")
    assert torch.equal(logits(load_model(str(tmp_path / "student"))), logits(student))


def test_sizes_that_transformers_refuses(tmp_path: Path) -> None:
    """Llama wants the hidden size divisible by the heads, although nothing depends on it."""
    student = tiny_model(num_key_value_heads=4)
    for layer in range(2):
        apply_edit(student, {"op": "narrow_kv_groups", "layer": layer, "keep": [0, 1, 3]})
    assert "32) is not a multiple" in str(why_not_plain(student))
    save_student(student, byte_tokenizer(), tmp_path / "student")
    assert torch.equal(logits(load_model(str(tmp_path / "student"))), logits(student))


def test_dtype_and_generation(folder: Path) -> None:
    model = load_model(str(folder), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert model.generation_config.eos_token_id == 1
    assert not model.training
    prompt = tiny_batch()["prompt_ids"]
    assert model.generate(prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt.shape[1] + 3


def test_tokenizer_without_a_warning_about_the_model_type(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(configuration_utils.logger, "warning", warnings.append)
    assert load_tokenizer(str(folder)).get_vocab() == byte_tokenizer().get_vocab()
    assert warnings == []


def test_plain_transformers_refuses_the_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="potstill-llama"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_equal_layers_leave_an_ordinary_folder(tmp_path: Path) -> None:
    student = tiny_model()
    assert why_not_plain(student) is None
    save_student(student, byte_tokenizer(), tmp_path / "student")
    assert not (tmp_path / "student" / STRUCTURE_FILE).exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), logits(student))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda layers: layers[:1], "expected the sizes of 2 layers in potstill/structure.json, found 1"),
        (lambda layers: [], "expected the sizes of 2 layers in potstill/structure.json, found 0"),
        (lambda layers: [layers[0], layers[1] | {"neurons": 40}], r"found others \(.*layers.1.mlp.*\)"),
    ],
)
def test_damaged_structure(damage, reason: str, folder: Path) -> None:
    structure = json.loads((folder / STRUCTURE_FILE).read_text())
    (folder / STRUCTURE_FILE).write_text(json.dumps({"layers": damage(structure["layers"])}))
    with pytest.raises(FileNotFoundError, match=f"expected a model at .* found none that loads .*{reason}") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", STRUCTURE_FILE])
def test_missing_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match="found none that loads"):
        load_model(str(folder))
