"""A student's folder beyond Hugging Face's files: the sizes of its layers, and the scales of its quantizers.

| file                          | holds                                                              | read by                       |
|-------------------------------|--------------------------------------------------------------------|-------------------------------|
| `potstill/structure.json`     | `layers`: neurons, query heads and key/value groups of each layer  | `load_model`, everywhere      |
|                               | `quantized`: for each format, the projections that are in it       | `load_student` of the export  |
|                               | `kv_cache`: the format of keys and values in the cache             | `load_student` of the export  |
| `potstill/scales.safetensors` | scales and zero points of these quantizers                         | `load_student` of the export  |

They lie in a folder of their own, as other programs take every `*.safetensors` beside the weights for weights (vLLM, SGLang).  Students
saved before have them beside the weights, as `potstill.json` and `potstill.safetensors`, and load as well.

transformers builds every layer from the one set of sizes in `config.json`.  Most students fit into that, and their folders are
ordinary ones, with `layers` left out.  A student that does not fit is written under a `model_type` of our own: plain
transformers then refuses the folder instead of building another model, and `load_unequal_layers` rebuilds this one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from models.loading.contents import read_object
from models.quantization.cache import cache_format, cache_quantizers
from models.quantization.linear import quantized_linears
from models.quantization.quantizers import FakeQuantizer
from models.structure.edits import apply_edit, replay
from models.structure.shape import LayerShape, edits_between, shape_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
STRUCTURE_FILE, SCALES_FILE = "potstill/structure.json", "potstill/scales.safetensors"
_BESIDE_THE_WEIGHTS = {STRUCTURE_FILE: "potstill.json", SCALES_FILE: "potstill.safetensors"}  # before they had a folder
TYPE_PREFIX = "potstill-"


def why_not_plain(model: PreTrainedModel) -> str | None:
    """Why plain transformers can't build this model from a `config.json`; None if it can."""
    sizes = sorted({astuple(layer) for layer in shape_of(model).layers})
    if len(sizes) > 1:
        return (
            f"layers of {len(sizes)} sizes (neurons, query heads, key/value groups: {sizes[0]} to {sizes[-1]}), and a "
            "config.json has one for all"
        )
    try:
        type(model.config).from_dict(model.config.to_dict())
    except (StrictDataclassError, ValueError) as error:
        return f"sizes that transformers does not build ({str(error).splitlines()[-1].strip().removesuffix('.')})"
    return None


def save_unequal_layers(model: PreTrainedModel, folder: Path) -> None:
    """Write a model without quantizers and adapters that `config.json` does not describe, for `load_unequal_layers`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    config = model.config.to_diff_dict()
    dtype = str(model.dtype).removeprefix("torch.")
    config |= {"model_type": TYPE_PREFIX + model.config.model_type, "architectures": None, "dtype": dtype}
    _write_json(folder / CONFIG_FILE, config)
    model.generation_config.save_pretrained(folder)
    _add_to_structure(folder, {"layers": [asdict(layer) for layer in shape_of(model).layers]})


def save_quantizers(model: PreTrainedModel, folder: Path) -> None:
    """Write the scales of a model's frozen quantizers, if it has any, into a folder with its rounded weights."""
    frozen = {name: linear for name, linear in quantized_linears(model).items() if linear.weight_quantizer.frozen}
    caches = {name: quantizer for name, quantizer in cache_quantizers(model).items() if quantizer.key.frozen}
    if not frozen and not caches:
        return
    scales = {key: buffer.detach().cpu().clone() for key, buffer in _scales({**frozen, **caches}).items()}
    (folder / SCALES_FILE).parent.mkdir(exist_ok=True)
    save_file(scales, folder / SCALES_FILE)
    formats: dict[str, list[str]] = {}
    for name, linear in frozen.items():
        formats.setdefault(linear.format, []).append(name)
    _add_to_structure(folder, {"quantized": formats} | ({"kv_cache": cache_format(model)} if caches else {}))


def _scales(owners: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Scales and zero points by name; what calibration saw is not needed any more."""
    return {
        f"{name}.{key}": buffer
        for name, owner in owners.items()
        for key, buffer in owner.named_buffers()
        if key.endswith((".scale", ".zero_point"))
    }


def has_unequal_layers(folder: Path) -> bool:
    """Whether a model folder is one that only `load_unequal_layers` reads."""
    return str(_read_json(folder / CONFIG_FILE).get("model_type")).startswith(TYPE_PREFIX)


def load_config(folder: Path) -> PretrainedConfig:
    """The configuration in a folder that `has_unequal_layers`, under the family's own name.

    It is filled field by field, as transformers' checks of a new one would refuse sizes that narrowing leads to.
    """
    fields = _read_json(folder / CONFIG_FILE)
    config = AutoConfig.for_model(fields.pop("model_type").removeprefix(TYPE_PREFIX))
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def load_unequal_layers(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Rebuild a student that `config.json` does not describe: the largest sizes first, narrowed to those of each layer.

    Raises:
        ValueError: The files do not describe one model.
    """
    sizes = tuple(LayerShape(**layer) for layer in _structure(folder).get("layers", []))
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(_with_room_for(sizes, load_config(folder)), dtype=dtype)
    model.tie_weights()
    largest = shape_of(model)
    replay(model, edits_between(largest, replace(largest, layers=sizes)))
    try:
        load_model(model, folder / WEIGHTS_FILE)
    except RuntimeError as error:
        difference = str(error).splitlines()[1].strip()
        raise ValueError(
            f"expected weights of the sizes in {STRUCTURE_FILE}, found others ({difference}); write the folder again"
        ) from error
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def restore_quantizers(model: PreTrainedModel, folder: Path) -> None:
    """Give a model that was loaded from a folder the quantizers that lie beside it, in place; most folders have none.

    Raises:
        ValueError: The files do not describe quantizers of this model.
    """
    structure = _structure(folder)
    for format, modules in structure.get("quantized", {}).items():
        apply_edit(model, {"op": "fake_quantize", "format": format, "modules": modules})
    if "kv_cache" in structure:
        apply_edit(model, {"op": "quantize_cache", "format": structure["kv_cache"]})
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizer)}
    if not quantizers:
        return
    path = _own_file(folder, SCALES_FILE)
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"expected scales that load from {str(path)!r}, found {error}; write the folder again"
        ) from error
    for name, quantizer in quantizers.items():
        for key in ("scale", "zero_point"):
            wanted, given = getattr(quantizer, key), found.get(f"{name}.{key}")
            if wanted is not None and (given is None or given.shape != wanted.shape):
                raise ValueError(
                    f"expected {name}.{key} of shape {tuple(wanted.shape)} in {str(path)!r}, found "
                    f"{'none' if given is None else f'one of {tuple(given.shape)}'}; write the folder again"
                )
        quantizer.set_scales(found[f"{name}.scale"], found.get(f"{name}.zero_point"))


def _with_room_for(sizes: Sequence[LayerShape], config: PretrainedConfig) -> PretrainedConfig:
    """Set the sizes of a configuration to the largest ones of all layers."""
    if len(sizes) != config.num_hidden_layers:
        raise ValueError(
            f"expected the sizes of {config.num_hidden_layers} layers in {STRUCTURE_FILE}, found {len(sizes)}; "
            "write the folder again"
        )
    groups = max(layer.kv_groups for layer in sizes)
    config.intermediate_size = max(layer.neurons for layer in sizes)
    config.num_key_value_heads = groups
    config.num_attention_heads = groups * max(layer.query_heads // layer.kv_groups for layer in sizes)
    return config


def _structure(folder: Path) -> dict[str, Any]:
    """What the file of the structure says, if there is one.

    Raises:
        ValueError: It says it in another form than we write.
    """
    path = _own_file(folder, STRUCTURE_FILE)
    found = read_object(path) if path.is_file() else {}
    sizes = {field.name for field in fields(LayerShape)}
    forms = {
        "layers": lambda layers: (
            isinstance(layers, list)
            and all(
                isinstance(layer, dict)
                and layer.keys() == sizes
                and all(type(n) is int and n > 0 for n in layer.values())
                for layer in layers
            )
        ),
        "quantized": lambda formats: (
            isinstance(formats, dict)
            and all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in formats.values())
        ),
        "kv_cache": lambda format: isinstance(format, str),
    }
    for key, fits in forms.items():
        if key in found and not fits(found[key]):
            raise ValueError(
                f"expected {key} in {str(path)!r} as Potstill writes it, found {str(found[key])[:80]!r}; write the "
                "folder again"
            )
    return found


def _own_file(folder: Path, name: str) -> Path:
    """A file of ours in a folder, which may have been written before these files had a folder of their own."""
    before = folder / _BESIDE_THE_WEIGHTS[name]
    return before if before.is_file() and not (folder / name).is_file() else folder / name


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no such file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _add_to_structure(folder: Path, entries: dict[str, Any]) -> None:
    path = folder / STRUCTURE_FILE
    path.parent.mkdir(exist_ok=True)
    _write_json(path, _read_json(path) | entries)
