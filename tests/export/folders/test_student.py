import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.folders.compressed import save_compressed
from export.folders.student import check_plain, load_student, rounded, save_student, without_quantizers
from models.loading.student_folder import SCALES_FILE, STRUCTURE_FILE
from models.quantization.linear import quantized_linears
from models.structure.edits import apply_edit
from tests.helpers.tiny_models import VOCAB, quantized, tiny_model, tiny_tokenizer

TOKENS = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_plain_round_trip(tmp_path):
    model = tiny_model()
    save_student(model, tiny_tokenizer(), tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "student").chat_template
    assert not (tmp_path / "student" / "potstill").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_pruned_students_load_with_plain_transformers(tmp_path):
    model = tiny_model()
    for layer in range(3):
        apply_edit(model, {"op": "narrow_mlp", "layer": layer, "keep": list(range(0, 96, 2))})
        apply_edit(model, {"op": "narrow_kv_groups", "layer": layer, "keep": [1]})
    save_student(model, tiny_tokenizer(), tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(logits(loaded), logits(model))
    assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 14)


def test_a_quantized_student_saves_the_weights_it_computes_with_and_its_scales(tmp_path):
    model = quantized(tiny_model())
    save_student(model, tiny_tokenizer(), tmp_path / "student")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for name, linear in quantized_linears(model).items():
        assert torch.equal(plain.get_parameter(f"{name}.weight"), linear.weight_quantizer(linear.weight))
    assert json.loads((tmp_path / "student" / STRUCTURE_FILE).read_text())["quantized"] == {
        "fp8_e4m3": list(quantized_linears(model))
    }
    again, _ = load_student(str(tmp_path / "student"))
    assert torch.equal(logits(again), logits(model))


def test_saving_leaves_the_model_alone(tmp_path):
    model = quantized(tiny_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_student(model, tiny_tokenizer(), tmp_path / "student", dtype=torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").dtype == torch.bfloat16
    assert not quantized_linears(without_quantizers(model))
    assert len(quantized_linears(model)) == 21


def test_sampling_settings_do_not_stop_saving(tmp_path):
    model = tiny_model()
    model.generation_config.temperature = 0.7
    save_student(model, tiny_tokenizer(), tmp_path / "student")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").generation_config.temperature == 0.7
    assert not model.generation_config.do_sample


def test_layers_of_different_sizes_are_for_potstill_alone(tmp_path):
    model = tiny_model()
    apply_edit(model, {"op": "narrow_mlp", "layer": 1, "keep": list(range(64))})
    quantized(model)
    save_student(model, tiny_tokenizer(), tmp_path / "student")
    again, tokenizer = load_student(str(tmp_path / "student"))
    assert torch.equal(logits(again), logits(model))
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(ValueError, match="potstill-llama.* does not recognize this architecture"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_who_asks_for_a_plain_folder_hears_why_there_is_none():
    model = tiny_model()
    check_plain(model)
    apply_edit(model, {"op": "narrow_mlp", "layer": 1, "keep": list(range(64))})
    with pytest.raises(
        ValueError, match=r"config.json describes, found layers of 2 sizes .*\(64, 4, 2\) to \(96, 4, 2\)"
    ):
        check_plain(model)
    three_heads = tiny_model(num_key_value_heads=4)
    for layer in range(3):
        apply_edit(three_heads, {"op": "narrow_kv_groups", "layer": layer, "keep": [0, 1, 2]})
    with pytest.raises(
        ValueError, match=r"sizes that transformers does not build \(.*64\) is not a multiple of .*3\)\)"
    ):
        check_plain(three_heads)


def unequal(model):
    apply_edit(model, {"op": "narrow_mlp", "layer": 1, "keep": list(range(64))})
    return model


def codes(model):
    return {name: linear.weight_quantizer.codes(linear.weight) for name, linear in quantized_linears(model).items()}


@pytest.mark.parametrize("structure", [lambda model: model, unequal])
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e4m3_per_channel", "int8", "int8_g32", "int4_g32", "int4_g32_zp"])
def test_a_folder_in_bfloat16_leads_back_to_the_same_codes(format, structure, tmp_path):
    model = quantized(structure(tiny_model(layers=2)), format=format)
    folder = save_student(model, tiny_tokenizer(), tmp_path / "student", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded, _ = load_student(str(folder))
    assert codes(loaded).keys() == codes(model).keys()
    assert all(torch.equal(code, codes(model)[name]) for name, code in codes(loaded).items())
    assert torch.equal(logits(loaded), logits(rounded(model, torch.bfloat16)))
    assert not torch.equal(logits(loaded), logits(model))  # embedding and norms had more digits


def test_nothing_beside_the_weights_could_be_taken_for_weights(tmp_path):
    folder = save_student(quantized(unequal(tiny_model())), tiny_tokenizer(), tmp_path / "student")
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not [path.name for path in folder.iterdir() if path.is_file() and "potstill" in path.name]


def test_scales_beside_the_weights_load_as_well(tmp_path):
    """As students were saved before."""
    model = quantized(unequal(tiny_model()))
    folder = save_student(model, tiny_tokenizer(), tmp_path / "student")
    (folder / STRUCTURE_FILE).rename(folder / "potstill.json")
    (folder / SCALES_FILE).rename(folder / "potstill.safetensors")
    (folder / "potstill").rmdir()
    assert torch.equal(logits(load_student(str(folder))[0]), logits(model))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b"no scales"), "header"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "found none"),
        (lambda path: save_file({name: torch.ones(3) for name in load_file(path)}, path), r"found one of \(3,\)"),
    ],
)
def test_scales_that_do_not_fit_get_one_sentence(damage, found, tmp_path):
    folder = save_student(quantized(tiny_model(layers=1)), tiny_tokenizer(), tmp_path / "student")
    damage(folder / SCALES_FILE)
    with pytest.raises(
        ValueError, match=f"expected .*scale.*potstill/scales.safetensors.*{found}.*write the folder again"
    ):
        load_student(str(folder))


@pytest.mark.parametrize("structure", [lambda model: model, unequal])
def test_a_head_that_equals_the_embedding_is_tied_again(structure, tmp_path):
    model = structure(tiny_model(tie_word_embeddings=False))
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    folder = save_student(model, tiny_tokenizer(), tmp_path / "student")
    stored = {"lm_head.weight", "model.embed_tokens.weight"} & load_file(folder / "model.safetensors").keys()
    assert len(stored) == 1
    loaded, _ = load_student(str(folder))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings


def test_tied_weights_are_rounded_once():
    model = rounded(tiny_model(), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = rounded(model, torch.bfloat16)
    assert all(one is other for one, other in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_files_have_the_permissions_that_the_umask_leaves(umask, file, folder, tmp_path):
    before = os.umask(umask)
    try:
        student = save_student(quantized(tiny_model(layers=1)), tiny_tokenizer(), tmp_path / "student")
        compressed = save_compressed(quantized(tiny_model(layers=1)), tiny_tokenizer(), tmp_path / "compressed")
    finally:
        os.umask(before)
    paths = [student, compressed, *student.rglob("*"), *compressed.rglob("*")]
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_file()} == {oct(file)}
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_dir()} == {oct(folder)}
