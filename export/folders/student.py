"""The student as a folder: an ordinary Hugging Face one wherever `config.json` can describe the model.

A quantized student is saved with the weight values that it computes with, already rounded to the FP8 grid, under the ordinary
names.  Its scales lie beside them in files that other programs ignore; with them `load_student` rebuilds the quantized student.
Rounding again with the same scale changes nothing, so nothing is lost.  Nor is it in bfloat16: that moves a value by 2^-9 of itself at most,
a quarter of a step for the largest code of 8 bits, and the next rounding takes it back to its code.

What is exported holds the same numbers everywhere, because weights are rounded to the type of the folder first (`rounded`).

A student whose layers have different sizes is saved in a form that only Potstill loads, see `models/loading/student_folder.py`.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.copies import shared_copy
from models.loading.contents import tie_equal_head
from models.loading.reference import load_model, load_tokenizer
from models.loading.student_folder import restore_quantizers, save_quantizers, save_unequal_layers, why_not_plain
from models.quantization.cache import remove_cache_quantizers
from models.quantization.linear import FakeQuantizedLinear, quantized_linears
from models.quantization.quantizers import FakeQuantizer
from models.structure.adapters import merged
from program.files import move_into_place, staging_folder

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
    plain = for_saving(merged(model), dtype)
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


def for_saving(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model without quantizers, weights in `dtype` (None: as they are), a head that equals the embedding tied to it again.

    It shares what does not change with `model`, which is not changed.
    """
    plain = without_quantizers(model, dtype=dtype)
    if dtype is not None:
        plain = _with_weights(plain, lambda weight: weight.to(dtype))
    if not isinstance(model.get_output_embeddings(), FakeQuantizedLinear):  # its codes are not the embedding's
        tie_equal_head(plain)
    make_generation_config_valid(plain)
    return plain


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with weights rounded to numbers of `dtype`, in the type that they have; it shares what does not change with `model`.

    Weights behind frozen quantizers are left alone, as their codes count, and they are the same after rounding in bfloat16.
    """
    codes = [linear.weight for linear in quantized_linears(model).values() if linear.weight_quantizer.frozen]
    kept = {id(weight) for weight in codes}

    def round_one(weight: nn.Parameter) -> Tensor:
        other = weight.detach().to(dtype).to(weight.dtype)
        return weight if id(weight) in kept or torch.equal(other, weight) else other

    return _with_weights(model, round_one)


def _with_weights(model: PreTrainedModel, change: Callable[[nn.Parameter], Tensor]) -> PreTrainedModel:
    """A copy with other weights; buffers (rotary frequencies, scales) are shared, what was tied stays tied.

    Weights that stay as they are are shared only if all of them stay: one small tensor of a file that is mapped into memory would keep
    the whole mapping.
    """
    copied = shared_copy(model)
    owners = [
        module for module in copied.modules() if not isinstance(module, FakeQuantizer)
    ]  # a learned scale's logarithm stays
    weights = {id(weight): weight for module in owners for weight in module.parameters(recurse=False)}
    others = {key: change(weight) for key, weight in weights.items()}
    if all(others[key] is weight for key, weight in weights.items()):
        return copied
    changed = {
        key: nn.Parameter((other.clone() if other is weights[key] else other).detach(), requires_grad=False)
        for key, other in others.items()
    }
    for module in owners:
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, changed[id(weight)])
    return copied


def without_quantizers(
    model: PreTrainedModel, *, keep_cache: bool = False, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model with ordinary linear layers that hold the rounded weights; it shares all other tensors with `model`.

    What it computes differs from the quantized model in the activations only, which are not rounded any more.

    Args:
        model: The model; it is not changed.
        keep_cache: Leave the quantizers of keys and values in place.
        dtype: Of the weights that were quantized; None: as they are.
    """
    plain = shared_copy(model)
    for name, quantized in quantized_linears(plain).items():
        linear = nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
        quantizer = quantized.weight_quantizer
        with torch.no_grad():
            weight = quantizer(quantized.weight) if quantizer.frozen else quantized.weight
        linear.weight = nn.Parameter(weight.detach().to(dtype or weight.dtype), requires_grad=False)
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
