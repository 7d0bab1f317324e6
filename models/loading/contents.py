"""Checks a model's files: they may name no code and no other place, and must hold exactly the model they describe.

transformers fills tensors that a folder lacks with random numbers, drops those that the configuration has no room for, and fetches
attention kernels, adapters and their base model from wherever a file says; here all of that is refused, in one sentence each.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from program.files import each_key_once

# What a configuration may ask for: everything else is, or falls back to, a kernel that is downloaded and run.
_IMPLEMENTATIONS = {None, False, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm"}
_KERNELS = ("attn_implementation", "experts_implementation", "use_kernels", "kernel_config")
_SHOWN = 3  # names in a sentence


def check_only_data(source: str, *, gguf: bool = False, local_files_only: bool = False) -> None:
    """Look at the files that say where a model's parts come from, before anything of it is loaded.

    `source` is a folder or hub id.  A GGUF file in the folder has configuration and weights in itself.

    Raises:
        ValueError: The configuration names a kernel or weights in another form, the index names a file elsewhere, or an adapter
            names another model.
    """

    def find(name: str) -> Path | None:
        found = cached_file(
            source,
            name,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return Path(found) if found else None

    if find(ADAPTER_CONFIG_NAME):
        raise ValueError(
            f"expected a whole model at {source!r}, found {ADAPTER_CONFIG_NAME}, an adapter that names another model; merge it into "
            "that model, or remove the file"
        )
    if gguf:
        return
    config = _read(find(CONFIG_NAME))
    for key, value in _entries(config):
        name = key.removeprefix("_").removesuffix("_internal")
        if name in _KERNELS and (isinstance(value, Mapping | list) or value not in _IMPLEMENTATIONS):
            raise ValueError(
                f"expected a {CONFIG_NAME} at {source!r} that names no kernel, found {key} {value!r}, which would be downloaded and "
                f"run; remove {key} from the file"
            )
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"expected weights in floating point at {source!r}, found a quantization_config of {method!r} in {CONFIG_NAME}; give the "
            "model that was quantized, or a .gguf file"
        )
    files = _read(find(SAFE_WEIGHTS_INDEX_NAME)).get("weight_map", {})
    for file in files.values() if isinstance(files, Mapping) else [files]:
        if not isinstance(file, str) or PurePosixPath(file).name != file or "\\" in file:
            raise ValueError(
                f"expected {SAFE_WEIGHTS_INDEX_NAME} at {source!r} to name files beside it, found {file!r}; get the folder again from "
                "a source you trust"
            )


def check_loaded(reference: str, report: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless transformers found a place for every tensor, and a tensor for every place.

    Tied weights may be missing; rotary frequencies, which old models stored, may be left over.
    """
    for what, key in (
        ("no tensor for", "missing_keys"),
        ("no place for", "unexpected_keys"),
        ("another size of", "mismatched_keys"),
    ):
        names = {entry if isinstance(entry, str) else entry[0] for entry in report[key]}
        names = {name for name in names if not name.endswith("rotary_emb.inv_freq")}
        if names:
            raise ValueError(
                f"expected weights at {reference!r} as its {CONFIG_NAME} describes them, found {what} {_some(names)}; get the model "
                f"again, or mend {CONFIG_NAME}"
            )


def check_finite(model: nn.Module, source: str) -> None:
    """Raise `ValueError` if a weight is infinite or not a number; `source` says where the model comes from."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not _is_finite(tensor.detach()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"expected finite weights in {source}, found {bad} of {tensor.numel()} in {name} that are infinite or not a number; "
                "take an earlier checkpoint, or get the model again"
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    """The smallest and the largest number tell: a single NaN makes both NaN; nothing of the tensor's size is made."""
    if not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _read(path: Path | None) -> dict[str, Any]:
    return read_object(path) if path else {}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: The file holds something else, or an object with a key twice, which readers understand either way.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_key_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected JSON in {str(path)!r}, found what does not parse ({error}); get the file again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object in {str(path)!r}, found {type(found).__name__}; get the file again")
    return found


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys at any depth, with their values."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def tie_equal_head(model: PreTrainedModel) -> bool:
    """Tie a head that has a weight of its own, equal to the embedding's, to the embedding, in place; whether there was one."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head.weight is embedding.weight or not torch.equal(head.weight, embedding.weight):
        return False
    head.weight = embedding.weight
    model.config.tie_word_embeddings = True
    return True
