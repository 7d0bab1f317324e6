"""A checked plan of an export: what is written, of which model.  All that can be found out beforehand is found out here; nothing is written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.label_prompts import label_token_ids
from export.cpu_graph.to_cpu import HEAD_MULTIPLE, check_cpu
from export.folders.compressed import check_compressible, check_compressible_formats
from export.folders.student import check_plain, rounded, without_quantizers
from export.layout import COMPRESSED, FAILED, FILES, WRITTEN
from export.onnx_graph.to_onnx import UNQUANTIZED, check_engine_formats, check_exportable, formats_of
from export.settings import ExportSettings
from models.architecture import decoder_layers
from models.loading.contents import check_finite
from models.post_training.format_choice import formats_by_pattern
from models.quantization.cache import cache_format
from models.quantization.formats import FORMATS
from models.quantization.linear import quantized_linears
from models.structure.adapters import merged
from program.files import check_kind


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes, all of it checked.

    Attributes:
        settings: As asked for.
        student: What `student/` holds: adapters merged, weights rounded to the folder's type.
        computed: What the graphs compute: the same, without quantizers of weights and inputs where the precision is none of theirs.
        for_cpu: The student in the format of `settings.cpu`, rounded, too; None where it names none.
        in_codes: What `compressed/` holds as codes and scales; None: there is no such folder.
        labels: The token of each label.
    """

    settings: ExportSettings
    student: PreTrainedModel
    computed: PreTrainedModel
    for_cpu: PreTrainedModel | None
    in_codes: PreTrainedModel | None
    labels: dict[str, int]


def plan_export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: ExportSettings,
    for_cpu: PreTrainedModel | None = None,
) -> ExportPlan:
    """Plan an export: see `export.pipeline.export_all`.

    Raises:
        ModuleNotFoundError, ValueError: Settings and model do not fit.
    """
    check_finite(model, "the model to export")
    labels = _label_tokens(tokenizer, settings.labels)
    model = merged(model)
    if "hf" in settings.formats and settings.plain:
        check_plain(model)
    assert (settings.cpu_format is not None) == (for_cpu is not None)
    model = rounded(model, settings.dtype)
    for_cpu = None if for_cpu is None else rounded(for_cpu, settings.dtype)
    quantized = model if for_cpu is None else for_cpu
    wanted = settings.compressed is True or bool(quantized_linears(quantized) or cache_format(quantized))
    in_codes = quantized if wanted and is_compressed(settings, partial(check_compressible, quantized)) else None
    computed = _plain(model, settings) if settings.precision in UNQUANTIZED else model
    if settings.graph:
        check_exportable(computed, precision=settings.precision, opset=settings.opset)
        if "engine" in settings.formats:
            check_engine_formats(formats_of(computed))
    check_cpu_model(model, settings)
    if settings.cpu is True:
        check_cpu(settings.precision, settings.opset, cache_format(model))
    return ExportPlan(settings, model, computed, for_cpu, in_codes, labels)


def check_output_free(output: Path) -> None:
    """Raise `ValueError` if a folder already holds an export."""
    found = [path for pattern in WRITTEN for path in sorted(output.glob(pattern))]
    if found:
        raise ValueError(
            f"expected an output folder without an export, found {found[0].relative_to(output).as_posix()} in {str(output)!r}; "
            "choose another folder, or replace the export with --overwrite"
        )


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `ValueError` for an output that is a file, has files where folders belong, or holds an export that shall stay."""
    for folder in (output, *(output / name for name in FILES)):
        check_kind(folder, folder=True)
    for file in ("report.json", "report.md"):
        check_kind(output / file, folder=False)
    if not overwrite:
        check_output_free(output)


def results_folder(output: Path, verification: Sequence[Mapping[str, Any]], *, overwrite: bool) -> Path:
    """Where the results are: what failed its verification never takes the place of an earlier export."""
    failed = any(check["status"] == "failed" for check in verification)
    return output / FAILED if failed and overwrite else output


def check_formats(
    model: PreTrainedModel, formats: Mapping[str, str], kv_cache: str | None, settings: ExportSettings
) -> None:
    """Raise for formats that cannot be exported like this; the model need not be quantized yet.

    Args:
        model: Its structure counts only.
        formats: Of projections, by name.
        kv_cache: Of keys and values.
        settings: What is to be exported.

    Raises:
        ModuleNotFoundError, ValueError: See `check_compressible_formats`, `check_engine_formats` and `check_cpu`.
    """
    if settings.cpu is True:
        check_cpu(settings.precision, settings.opset, kv_cache)
    quantized = {name: format for name, format in formats.items() if format in FORMATS}
    if settings.compressed is True and settings.cpu_format is None:
        check_compressible_formats(model, quantized.items(), kv_cache)
    if "engine" in settings.formats:
        check_engine_formats(quantized.values())


def check_cpu_model(model: PreTrainedModel, settings: ExportSettings) -> None:
    """Raise for a model that has no graph for CPUs, or cannot be given the format of `settings.cpu`; see `check_formats`."""
    if not settings.cpu:
        return
    width = decoder_layers(model)[0].head_dim
    if width % HEAD_MULTIPLE:
        raise ValueError(
            f"expected attention heads of a multiple of {HEAD_MULTIPLE} channels for a graph for the CPU, found {width}, which ONNX Runtime's "
            "attention does not take; leave the graph out"
        )
    if settings.cpu_format is not None and settings.compressed is True:
        formats = formats_by_pattern(model, settings.cpu_format, {})
        check_compressible_formats(model, formats.items(), None)


def _label_tokens(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> dict[str, int]:
    """The token of each label; see `label_token_ids` for which are refused.  No labels are none."""
    return dict(zip(labels, label_token_ids(tokenizer, labels), strict=True)) if labels else {}


def is_compressed(settings: ExportSettings, check: Callable[[], None]) -> bool:
    """Whether a quantized student gets a compressed folder, too.

    Args:
        settings: With `auto`, it gets one if the check passes; if not, one line says why.
        check: It raises if there can be none; not called if none is wanted.

    Raises:
        ModuleNotFoundError, ValueError: The check's, where the settings ask for the folder.
    """
    if settings.compressed is False or (settings.compressed == "auto" and "hf" not in settings.formats):
        return False
    try:
        check()
    except (ModuleNotFoundError, ValueError) as error:
        if settings.compressed == "auto":
            rank_zero_info(f"{COMPRESSED}/ is left out: {error}")
            return False
        raise
    return True


def _plain(model: PreTrainedModel, settings: ExportSettings) -> PreTrainedModel:
    """What `student/` holds for programs that know no quantizers."""
    if not quantized_linears(model):
        return model
    return rounded(without_quantizers(model, keep_cache=True), settings.dtype)
