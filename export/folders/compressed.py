"""A quantized student as a Hugging Face folder of codes and scales, in the form of the package compressed-tensors.

`save_student` writes rounded weights as ordinary floats; this folder holds what they are made of, so its decoder has the size of
its format, and programs with kernels for it (vLLM, SGLang) multiply the codes themselves.  `config.json` says how to read them:

| our grid         | of a weight                                  | of an input                              |
|------------------|----------------------------------------------|------------------------------------------|
| one scale        | strategy `tensor`, `weight_scale` (1,)       | strategy `tensor`, `input_scale` (1,)    |
| one scale a row  | strategy `channel`, `weight_scale` (O, 1)    | strategy `token`, `dynamic`              |
| groups           | strategy `group`, `weight_scale` (O, G)      |                                          |

Scales of keys and values are `k_scale` and `v_scale` (1,) of each attention, `kv_cache_scheme` says what they are for (vLLM reads
FP8 there, transformers INT8 as well).

Weights whose inputs are left alone are packed into int32 words (`weight_packed`), the others are stored as FP8 or INT8.

Plain transformers turns the codes back into weights and rounds the inputs by the package's rules.  In float32 both give the bits of
our own operator, with one exception: a live INT8 scale of a token is |x|max / 127.5 there, |x|max / 127 here (and in vLLM).

With zero points, transformers has to turn codes into weights while it loads them (`"dequantize": true`): the other way, at the first
call, expects zero points that are not packed (compressed-tensors 0.20).  That way knows one format for all layers.

Legend: O outputs, I inputs, G groups of inputs.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from export.folders.student import for_saving
from models.architecture import CACHE
from models.loading.student_folder import CONFIG_FILE, why_not_plain
from models.quantization.cache import CACHE_GRIDS, cache_format, cache_quantizers
from models.quantization.formats import BITS, Grid, format_of
from models.quantization.linear import FakeQuantizedLinear, quantized_linears
from models.structure.adapters import merged
from program.files import move_into_place, staging_folder

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

_CACHES_IT_FINDS = ("past_key_values",)  # compressed-tensors 0.20: arguments of an attention that it knows as a cache


def save_compressed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype | None = None
) -> Path:
    """Write a folder that transformers, vLLM and SGLang load where compressed-tensors is installed; it replaces an existing one.

    Args:
        model: The student with frozen quantizers; it is not changed.
        tokenizer: Saved with its chat template.
        folder: Where to write.
        dtype: Floating point type of what is not quantized (embedding, norms), and of what programs compute in; None: as it is.

    Raises:
        ModuleNotFoundError, ValueError: See `check_compressible`; nothing is written.
    """
    model = merged(model)
    check_compressible(model)
    from compressed_tensors.compressors import ModelCompressor, compress_module
    from compressed_tensors.quantization import QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import is_module_quantized

    linears = quantized_linears(model)
    plain = for_saving(model, dtype)
    apply_quantization_config(plain, _config(plain, linears, cache_format(model)), show_progress=False)
    for name, linear in linears.items():
        _set_scales(plain.get_submodule(name), linear)
    for name, quantizer in cache_quantizers(model).items():
        attention = plain.get_submodule(name.rpartition(".")[0])
        _fill(attention, {"k_scale": quantizer.key.scale, "v_scale": quantizer.value.scale})
    # The package rounds the weights again: they lie on the grid already, so every code comes out as it was.
    # Module by module: `compress_model` wants all processes of a distributed run to take part.
    compressor = ModelCompressor.from_pretrained_model(plain)
    for module in filter(is_module_quantized, list(plain.modules())):
        compress_module(module)
    compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
    with staging_folder(folder.parent) as staging:
        target = staging / folder.name
        plain.save_pretrained(target)
        compressor.update_config(str(target))
        if _zero_points(linears):
            _dequantize_at_load(target / CONFIG_FILE)
        tokenizer.save_pretrained(target)
        move_into_place(target, folder)
    return folder


def check_compressible(model: PreTrainedModel) -> None:
    """Raise for a student that has no such folder.

    Raises:
        ModuleNotFoundError: compressed-tensors is not installed.
        ValueError: A student without frozen quantizers, one that plain transformers could not build, rows that are not whole groups,
            or zero points beside another format.
    """
    linears = quantized_linears(model)
    check_compressible_formats(model, [(name, linear.format) for name, linear in linears.items()], cache_format(model))
    frozen = [name for name, linear in linears.items() if all(quantizer.frozen for quantizer in linear.quantizers())]
    if not (linears or cache_quantizers(model)) or len(frozen) < len(linears):
        raise ValueError(
            f"expected a student whose quantizers all have scales, found {len(frozen)} of {len(linears)} quantized layers with them; "
            "train with QuantizationAwareTraining, or quantize the trained model, before a compressed folder is written"
        )


def check_compressible_formats(
    model: PreTrainedModel, formats: Collection[tuple[str, str]], kv_cache: str | None
) -> None:
    """Raise for projections with their formats, and a cache, that such a folder cannot hold, whether the model is quantized yet or not.

    Raises:
        ModuleNotFoundError, ValueError: As `check_compressible`.
    """
    try:
        import compressed_tensors  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package compressed-tensors, which packs quantized weights for vLLM and SGLang, found no module "
            f"{error.name!r}; run `pip install -e '.[serving]'`"
        ) from error
    if kv_cache is not None and CACHE not in _CACHES_IT_FINDS:
        raise ValueError(
            f"expected transformers before 5.24 for keys and values in {kv_cache}, as compressed-tensors 0.20 does not find them behind the "
            f"argument's new name, found one that calls it {CACHE!r}; run `pip install -e .[serving]`, or leave the compressed folder out"
        )
    reason = why_not_plain(model)
    if reason is not None:
        raise ValueError(
            f"expected a student that one Hugging Face config.json describes, found {reason}; leave the compressed folder out, or "
            "prune all layers alike"
        )
    for name, format in formats:
        size, inputs = format_of(format).weight.group_size, model.get_parameter(f"{name}.weight").shape[1]
        if size and inputs % size:
            raise ValueError(
                f"expected rows of whole groups of {size} weights for compressed-tensors, found {inputs} inputs in {name}; "
                "choose a format with smaller groups or one scale a row, or another number of neurons"
            )
    different = sorted({format for _, format in formats})
    if len(different) > 1 and any(format_of(format).weight.zero_point for format in different):
        raise ValueError(
            f"expected zero points in all quantized layers or in none, as transformers reads them in one format only, found "
            f"{', '.join(different)}; choose formats without zero points, or one for all layers"
        )


def _zero_points(linears: dict[str, FakeQuantizedLinear]) -> bool:
    return any(format_of(linear.format).weight.zero_point for linear in linears.values())


def _dequantize_at_load(config_file: Path) -> None:
    """Tell transformers to make weights of codes while it loads; other programs do not look at this."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["quantization_config"]["dequantize"] = True
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(plain: nn.Module, linears: dict[str, FakeQuantizedLinear], kv_cache: str | None) -> "QuantizationConfig":
    """A group of targets for each format; one format for all is said in the short way that every program reads."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    targets: dict[str, list[str]] = {}
    for name, linear in linears.items():
        targets.setdefault(linear.format, []).append(name)
    if len(targets) == 1:
        targets = {format: ["Linear"] for format in targets}
    schemes = {
        name: QuantizationScheme(
            targets=modules,
            weights=_arguments(format_of(name).weight, "channel"),
            input_activations=_arguments(format_of(name).input, "token"),
        )
        for name, modules in targets.items()
    }
    others = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name not in linears]
    cache = _arguments(None if kv_cache is None else CACHE_GRIDS[kv_cache], "token")
    return QuantizationConfig(config_groups=schemes, ignore=others, kv_cache_scheme=cache)


def _arguments(grid: Grid | None, row: str) -> "QuantizationArgs | None":
    """A grid in the package's words; `row` is its word for one scale a row."""
    if grid is None:
        return None
    from compressed_tensors.quantization import QuantizationArgs

    settings: dict[str, Any] = {"strategy": row if grid.scales == "row" else grid.scales}
    if grid.scales == "group":
        settings["group_size"] = grid.group_size
    return QuantizationArgs(
        num_bits=BITS[grid.numbers],
        type="float" if grid.numbers == "fp8_e4m3" else "int",
        symmetric=not grid.zero_point,
        dynamic=settings["strategy"] == "token",
        **settings,
    )


def _set_scales(module: nn.Module, linear: FakeQuantizedLinear) -> None:
    """Copy our scales and zero points into the parameters that the package has made for them."""
    weight, input = linear.weight_quantizer, linear.input_quantizer
    values = {"weight_scale": weight.scale, "weight_zero_point": weight.zero_point}
    if input is not None and input.grid.scales == "tensor":
        values["input_scale"] = input.scale
    _fill(module, {name: value for name, value in values.items() if value is not None})


def _fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameter = module.get_parameter(name)
        parameter.data = value.detach().clone().view(parameter.shape)
