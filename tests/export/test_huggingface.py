import json

import pytest
import torch
from tiny_models import VOCAB, quantized, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.huggingface import check_plain, load_student, save_student, without_quantizers
from models.quantization.linear import quantized_linears
from models.structure import apply_edit

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
    assert not (tmp_path / "student" / "potstill.json").exists()
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
    assert json.loads((tmp_path / "student" / "potstill.json").read_text())["quantized"] == {
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
