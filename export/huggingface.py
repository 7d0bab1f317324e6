"""The student as a folder: an ordinary Hugging Face one wherever `config.json` can describe the model.

A quantized student is saved with the weight values that it computes with, already rounded to the FP8 grid, under the ordinary
names.  Its scales lie beside them in files that other programs ignore; with them `load_student` rebuilds the quantized student.
Rounding again with the same scale changes nothing, so nothing is lost.

A student whose layers have different sizes is saved in a form that only Potstill loads, see `models/folder.py`.
"""

import copy
import itertools
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from export.files import move_into_place, staging_folder
from models.folder import restore_quantizers, save_quantizers, save_unequal_layers, why_not_plain
from models.lora import merged
from models.pretrained import load_model, load_tokenizer
from models.quantization.cache import remove_cache_quantizers
from models.quantization.linear import quantized_linears

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
    """
    plain = without_quantizers(merged(model))
    if dtype is not None:
        plain = copy.deepcopy(plain)
        for parameter in plain.parameters():  # buffers (rotary frequencies) must keep their digits
            parameter.data = parameter.data.to(dtype)
    make_generation_config_valid(plain)
    with staging_folder(folder.parent) as staging:
        target = staging / folder.name
        if why_not_plain(plain) is None:
            plain.save_pretrained(target)
        else:
            save_unequal_layers(plain, target)
        tokenizer.save_pretrained(target)
        save_quantizers(model, target)
        move_into_place(target, folder)
    return folder


def load_student(reference: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any model reference with its tokenizer; a folder written by `save_student` with its quantizers, if it has any.

    Raises:
        FileNotFoundError: There is nothing that loads.
    """
    model, tokenizer = load_model(reference), load_tokenizer(reference)
    restore_quantizers(model, Path(reference).expanduser())
    return model, tokenizer


def check_plain(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a student that plain transformers could not load."""
    reason = why_not_plain(model)
    if reason is not None:
        raise ValueError(
            f"expected a student that one Hugging Face config.json describes, found {reason}; leave --plain out (the folder then "
            "loads through Potstill only; ONNX and TensorRT take every student), or prune all layers alike"
        )


def without_quantizers(model: PreTrainedModel, *, keep_cache: bool = False) -> PreTrainedModel:
    """The model with ordinary linear layers that hold the rounded weights; it shares all other tensors with `model`.

    What it computes differs from the quantized model in the activations only, which are not rounded any more.

    Args:
        model: The model; it is not changed.
        keep_cache: Leave the quantizers of keys and values in place.
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
    if not keep_cache:
        remove_cache_quantizers(plain)
    return plain


def make_generation_config_valid(model: PreTrainedModel) -> None:
    """Set `do_sample`: transformers refuses to save sampling settings without it, and many models have them."""
    model.generation_config = copy.deepcopy(model.generation_config)
    if any(getattr(model.generation_config, name, None) is not None for name in _SAMPLING):
        model.generation_config.do_sample = True
