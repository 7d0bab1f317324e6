import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from export.__main__ import main
from export.folders.compressed import save_compressed
from export.folders.student import save_student
from models.quantization import FORMATS, quantizers
from models.quantization.linear import freeze_scales, quantized_linears
from models.structure.edits import apply_edit, quantize_decoder
from tests.helpers.tiny_models import VOCAB, left_padded_prompts, quantized, tiny_model, tiny_tokenizer

PROMPTS = left_padded_prompts()
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}


def logits(model):
    """Of the tokens that are no padding."""
    with torch.no_grad():
        return model(PROMPTS["prompt_ids"], attention_mask=PROMPTS["prompt_mask"]).logits[PROMPTS["prompt_mask"].bool()]


def assert_transformers_computes_the_same(model, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not quantized_linears(loaded)
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))
    for name, linear in quantized_linears(model).items():
        assert torch.equal(loaded.get_parameter(f"{name}.weight"), linear.weight_quantizer(linear.weight))


def by_the_package(rows_NI, grid):
    """The scale of a token in compressed-tensors: the largest magnitude over half of the range."""
    half = 127.5 if grid.numbers == "int8" else 448.0
    return rows_NI.float().abs().amax(dim=-1).div(half).clamp(min=2.0**-24)


@pytest.mark.parametrize("format", FORMATS)
def test_plain_transformers_computes_the_same_bits(format, tmp_path, monkeypatch):
    model = quantized(tiny_model(layers=2, **SIZES), format=format)
    ours = logits(model)
    folder = save_compressed(model, tiny_tokenizer(), tmp_path / "compressed")
    monkeypatch.setattr(quantizers, "row_scales", by_the_package)
    assert_transformers_computes_the_same(model, folder)
    assert torch.equal(logits(model), ours) == (format != "int8")
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]


@pytest.mark.parametrize(
    ("format", "stored"),
    [
        ("fp8_e4m3", {"weight": (torch.float8_e4m3fn, (64, 92)), "weight_scale": (torch.float32, (1,))}),
        ("fp8_e4m3_per_channel", {"weight": (torch.float8_e4m3fn, (64, 92)), "weight_scale": (torch.float32, (64, 1))}),
        ("int8", {"weight": (torch.int8, (64, 92)), "weight_scale": (torch.float32, (64, 1))}),
        ("int8_weight_only", {"weight_packed": (torch.int32, (64, 23)), "weight_scale": (torch.float32, (64, 1))}),
        ("int4_g32", {"weight_packed": (torch.int32, (64, 12)), "weight_scale": (torch.float32, (64, 3))}),
        ("int4_g32_zp", {"weight_packed": (torch.int32, (64, 12)), "weight_zero_point": (torch.int32, (8, 3))}),
    ],
)
def test_what_is_stored(format, stored, tmp_path):
    model = quantized(tiny_model(layers=1, intermediate_size=96 if "_g" in format else 92), format=format)
    folder = save_compressed(model, tiny_tokenizer(), tmp_path / "compressed")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert {key: (tensors[f"{name}.{key}"].dtype, tuple(tensors[f"{name}.{key}"].shape)) for key in stored} == stored
    quantizer, weight = quantized_linears(model)[name].weight_quantizer, quantized_linears(model)[name].weight
    if "weight" in stored:
        assert torch.equal(tensors[f"{name}.weight"].float(), quantizer.codes(weight).float())
    scales = tensors[f"{name}.weight_scale"]
    assert torch.equal(scales, quantizer.scale.view(scales.shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["fp8_e4m3", "int8_weight_only", "int4_g32_zp"])
def test_students_in_16_bits_keep_their_codes_and_scales(format, dtype, tmp_path):
    model = quantized(tiny_model(layers=1), format=format).to(dtype)
    folder = save_compressed(model, tiny_tokenizer(), tmp_path / "compressed")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
    exact = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=exact)
    for name, linear in quantized_linears(model).items():
        assert torch.equal(loaded.get_parameter(f"{name}.weight"), linear.weight_quantizer(linear.weight.float()))


def test_several_formats_become_groups_with_their_targets(tmp_path):
    model = tiny_model(layers=2, intermediate_size=160)
    names = quantize_decoder(model, "int8")["modules"]
    formats = {
        "fp8_e4m3": [name for name in names if name.startswith("model.layers.0.self_attn")],
        "int8_static": [name for name in names if name.startswith("model.layers.1.self_attn")],
        "int4_g32": [name for name in names if name.endswith("down_proj")],
    }
    for format, modules in formats.items():
        apply_edit(model, {"op": "fake_quantize", "format": format, "modules": modules})
    with torch.no_grad():
        model.train()(torch.randint(0, VOCAB, (8, 24), generator=torch.Generator().manual_seed(1)))
    freeze_scales(model)
    folder = save_compressed(model.eval(), tiny_tokenizer(), tmp_path / "compressed")
    assert_transformers_computes_the_same(model, folder)

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert found == dict(zip(("float-quantized", "int-quantized", "pack-quantized"), formats.values(), strict=True))
    assert config["format"] == "mixed-precision"
    assert sorted(config["ignore"]) == sorted(["lm_head", *(name for name in names if "gate" in name or "up_" in name)])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text", "phi3"])
def test_other_families(family, tmp_path):
    model = quantized(tiny_model(family, layers=2), format="int8_g32")
    folder = save_compressed(model, tiny_tokenizer(), tmp_path / "compressed")
    assert_transformers_computes_the_same(model, folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]


def test_pruned_students_and_models_that_sample(tmp_path):
    model = tiny_model()
    for layer in range(3):
        apply_edit(model, {"op": "narrow_mlp", "layer": layer, "keep": list(range(0, 96, 2))})
        apply_edit(model, {"op": "narrow_kv_groups", "layer": layer, "keep": [1]})
    model.generation_config.temperature = 0.7
    quantized(model, format="fp8_e4m3")
    folder = save_compressed(model, tiny_tokenizer(), tmp_path / "compressed")
    assert_transformers_computes_the_same(model, folder)


def test_saving_leaves_the_model_alone_and_replaces_the_folder(tmp_path):
    model = quantized(tiny_model(layers=1), format="int4_g32_zp")
    before, config = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    (tmp_path / "compressed").mkdir()
    (tmp_path / "compressed" / "old.txt").write_text("old")
    folder = save_compressed(model, tiny_tokenizer(), tmp_path / "compressed")
    assert not (folder / "old.txt").exists()
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def unequal():
    model = tiny_model()
    apply_edit(model, {"op": "narrow_mlp", "layer": 1, "keep": list(range(64))})
    return quantized(model, format="int8")


def still_observing():
    model = tiny_model()
    apply_edit(model, quantize_decoder(model, "fp8_e4m3"))
    return model


def mixed_zero_points():
    model = tiny_model()
    names = quantize_decoder(model, "int4_g32_zp")["modules"]
    apply_edit(model, {"op": "fake_quantize", "format": "int4_g32_zp", "modules": names[:7]})
    apply_edit(model, {"op": "fake_quantize", "format": "int8_weight_only", "modules": names[7:]})
    freeze_scales(model)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_model, "expected a student whose quantizers all have scales, found 0 of 0"),
        (still_observing, "found 0 of 21 quantized layers with them"),
        (unequal, "found layers of 2 sizes"),
        (
            lambda: quantized(tiny_model(), format="int8_g64"),
            r"whole groups of 64 .* found 96 inputs in .*0.mlp.down_proj",
        ),
        (mixed_zero_points, "in one format only, found int4_g32_zp, int8_weight_only"),
    ],
)
def test_what_the_form_does_not_hold_is_refused_before_anything_is_written(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_compressed(make(), tiny_tokenizer(), tmp_path / "out" / "compressed")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"compressed-tensors.*pip install -e '.\[serving\]'"):
        save_compressed(quantized(tiny_model()), tiny_tokenizer(), tmp_path / "out" / "compressed")
    assert not list(tmp_path.iterdir())


def run(model, folder, *options):
    """The command on a saved model; returns the exit status and the artefacts of the report."""
    save_student(model, tiny_tokenizer(), folder / "model")
    quick = ["--engine", "none", "--decode-steps", "1", "--prompts", "1", "--benchmark-repetitions", "0"]
    status = main([str(folder / "model"), "--output", str(folder / "out"), "--overwrite", *quick, *options])
    rows = json.loads((folder / "out/report.json").read_text())["artefacts"] if status == 0 else []
    return status, {row["path"]: row for row in rows}


def test_the_command_writes_it_beside_the_student_unless_told_otherwise(tmp_path):
    model = quantized(tiny_model(layers=1), format="int8_g32")
    status, rows = run(model, tmp_path, "--student-dtype", "float32")
    assert status == 0
    assert rows["compressed"]["kind"] == "compressed-tensors folder"
    assert 0 < rows["compressed"]["bytes"] < rows["student"]["bytes"]
    assert_transformers_computes_the_same(model, tmp_path / "out/compressed")
    assert run(model, tmp_path, "--no-compressed")[1].keys() == {"student", "onnx/model.onnx"}
    assert not (tmp_path / "out/compressed").exists()


def test_a_student_without_quantizers_has_none_and_hears_nothing(tmp_path, caplog, capsys):
    assert run(tiny_model(layers=1), tmp_path)[1].keys() == {"student", "onnx/model.onnx"}
    assert "compressed" not in caplog.text
    assert run(tiny_model(layers=1), tmp_path / "asked", "--compressed")[0] == 2
    assert "expected a student whose quantizers all have scales, found 0 of 0" in capsys.readouterr().err
    assert not (tmp_path / "asked/out").exists()


@pytest.mark.parametrize(
    ("make", "reason"), [(unequal, "layers of 2 sizes"), (mixed_zero_points, "in one format only")]
)
def test_where_the_form_does_not_hold_the_student_one_line_says_so(make, reason, tmp_path, caplog, capsys):
    with caplog.at_level("INFO"):
        assert "compressed" not in run(make(), tmp_path)[1]
    assert (
        len(
            [
                line
                for line in caplog.messages
                if line.startswith("compressed/ is left out: expected") and reason in line
            ]
        )
        == 1
    )
    assert run(make(), tmp_path / "asked", "--compressed")[0] == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "asked/out").exists()


def test_a_missing_package_leaves_it_out_and_says_how_to_install_it(tmp_path, caplog, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    model = quantized(tiny_model(layers=1))
    with caplog.at_level("INFO"):
        assert "compressed" not in run(model, tmp_path)[1]
    assert "compressed/ is left out: expected the package compressed-tensors" in caplog.text
    assert "pip install -e '.[serving]'" in caplog.text
    assert run(model, tmp_path, "--compressed")[0] == 2
    assert "expected the package compressed-tensors" in capsys.readouterr().err


@pytest.mark.parametrize(("format", "head"), [("int4_g32", "int4_g32"), ("fp8_e4m3", "int8_g32")])
def test_a_quantized_head_is_stored_as_codes_too(format, head, tmp_path):
    model = quantized(tiny_model(layers=1), format=format, head=head)
    folder = save_compressed(model, tiny_tokenizer(), tmp_path / "compressed")
    assert_transformers_computes_the_same(model, folder)
    tensors = load_file(folder / "model.safetensors")
    assert {"lm_head.weight_packed", "lm_head.weight_scale", "model.embed_tokens.weight"} <= tensors.keys()
    assert "lm_head.weight" not in tensors
