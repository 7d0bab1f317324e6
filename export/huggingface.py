"""The student as an ordinary Hugging Face folder, readable by plain `AutoModelForCausalLM.from_pretrained`.

A quantized student is saved with the weight values that it computes with, already rounded to the FP8 grid, under the ordinary
names.  Its scales lie beside them in `potstill.json` and `potstill.safetensors`, which other programs ignore; with them
`load_student` rebuilds the quantized student.  Rounding again with the same scale changes nothing, so nothing is lost.
"""

import copy
import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from export.files import move_into_place, staging_folder
from models.architecture import decoder_layers
from models.lora import merged
from models.pretrained import load_model, load_tokenizer
from models.quantization.linear import quantized_linears
from models.structure import apply_edit, is_uniform

STRUCTURE_FILE = "potstill.json"
SCALES_FILE = "potstill.safetensors"
FORMAT = "fp8_e4m3"
# Settings that transformers accepts in a generation config only together with do_sample=True.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def save_student(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype | None = None
) -> Path:
    """Write a folder with `config.json`, safetensors weights and the tokenizer; an existing one is replaced at the end.

    Args:
        model: The student; it is not changed.
        tokenizer: Saved with its chat template.
        folder: Where to write.
        dtype: Floating point type of the saved weights; None: as they are.

    Raises:
        ValueError: The layers have different sizes, which one `config.json` can't express.
    """
    check_saveable(model)
    plain = without_quantizers(merged(model))
    if dtype is not None:
        plain = copy.deepcopy(plain)
        for parameter in plain.parameters():  # buffers (rotary frequencies) must keep their digits
            parameter.data = parameter.data.to(dtype)
    _make_generation_config_valid(plain)
    with staging_folder(folder.parent) as staging:
        target = staging / folder.name
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)
        _save_scales(model, target)
        move_into_place(target, folder)
    return folder


def load_student(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a folder written by `save_student`, with its quantizers if it has any; other Hugging Face folders load as well."""
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    if (folder / STRUCTURE_FILE).is_file():
        structure = json.loads((folder / STRUCTURE_FILE).read_text())
        apply_edit(model, {"op": "fake_quantize", "format": structure["format"], "modules": structure["modules"]})
        scales = load_file(folder / SCALES_FILE)
        for name, linear in quantized_linears(model).items():
            for kind in ("input_quantizer", "weight_quantizer"):
                prefix = f"{name}.{kind}."
                getattr(linear, kind).load_state_dict({key: scales[prefix + key] for key in ("amax", "scale")})
    return model, tokenizer


def check_saveable(model: PreTrainedModel) -> None:
    """Raise `ValueError` if the layers' sizes differ."""
    if not is_uniform(model):
        sizes = sorted(
            {(layer.num_neurons, layer.num_query_heads, layer.num_kv_groups) for layer in decoder_layers(model)}
        )
        raise ValueError(
            "expected decoder layers of one size, as a Hugging Face config.json describes one for all, found layers of "
            f"{len(sizes)} sizes (neurons, query heads, key/value groups: {sizes[0]} to {sizes[-1]}); leave the Hugging Face "
            "folder out (ONNX and TensorRT take such models), or prune all layers alike"
        )


def without_quantizers(model: PreTrainedModel) -> PreTrainedModel:
    """The model with ordinary linear layers that hold the rounded weights; it shares all other tensors with `model`.

    What it computes differs from the quantized model in the activations only, which are not rounded any more.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    plain = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    for name, quantized in quantized_linears(plain).items():
        linear = nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
        quantizer = quantized.weight_quantizer
        with torch.no_grad():
            weight = quantizer(quantized.weight) if quantizer.frozen else quantized.weight
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        linear.bias = quantized.bias
        owner, _, child = name.rpartition(".")
        setattr(plain.get_submodule(owner), child, linear.train(quantized.training))
    return plain


def _make_generation_config_valid(model: PreTrainedModel) -> None:
    """Set `do_sample`: transformers refuses to save sampling settings without it, and many models have them."""
    model.generation_config = copy.deepcopy(model.generation_config)
    if any(getattr(model.generation_config, name, None) is not None for name in _SAMPLING):
        model.generation_config.do_sample = True


def _save_scales(model: PreTrainedModel, folder: Path) -> None:
    frozen = {name: linear for name, linear in quantized_linears(model).items() if linear.weight_quantizer.frozen}
    if not frozen:
        return
    scales = {
        f"{name}.{kind}.{key}": getattr(getattr(linear, kind), key).detach().cpu().clone()
        for name, linear in frozen.items()
        for kind in ("input_quantizer", "weight_quantizer")
        for key in ("amax", "scale")
    }
    save_file(scales, folder / SCALES_FILE)
    structure = {"format": FORMAT, "modules": list(frozen)}
    (folder / STRUCTURE_FILE).write_text(json.dumps(structure, indent=2) + "\n")
