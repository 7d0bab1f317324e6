"""A checked plan of an export: what is written, of which model.

All that can be found out beforehand is found out here; nothing is written.  Nobody after the plan reads the settings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.label_prompts import label_token_ids
from export import layout
from export.benchmark.graphs import ShortBenchmark
from export.engine.to_tensorrt import Profile
from export.engine.write import EnginePlan
from export.folders.compressed import check_compressible, check_compressible_formats
from export.folders.student import check_plain, rounded, without_quantizers
from export.onnx_graph.to_onnx import (
    UNQUANTIZED,
    Precision,
    check_cpu,
    check_engine_formats,
    check_exportable,
    formats_of,
)
from export.settings import ExportSettings
from export.verify import Extent
from models.architecture import decoder_layers
from models.loading.contents import check_finite
from models.loading.student_folder import why_not_plain
from models.quantization.cache import cache_format
from models.quantization.formats import FORMATS
from models.quantization.linear import quantized_linears
from models.structure.adapters import merged
from models.structure.edits import quantize_decoder
from program.files import check_kind

_HEAD_MULTIPLE = 16  # channels of an attention head, of ONNX Runtime's GroupQueryAttention


@dataclass(frozen=True)
class Variants:
    """One student in all forms that an export writes: adapters merged, weights rounded to the type of the folders.

    Attributes:
        student: What `student/` holds.
        computed: What the graphs compute: the same, without quantizers of weights and inputs where the precision is none of theirs.
        for_cpu: The student in the format of `ExportSettings.cpu`; None where it names none.
        in_codes: What `compressed/` holds as codes and scales; None: there is no such folder.
    """

    student: PreTrainedModel
    computed: PreTrainedModel
    for_cpu: PreTrainedModel | None
    in_codes: PreTrainedModel | None


@dataclass(frozen=True)
class GraphPlan:
    """The graphs of one model.

    Attributes:
        precision: See `ExportSettings`, as for `opset` and `prefill`.
        labels: The token of each label; none: no graph and no engine for labels.
        cpu: Whether there is one for ONNX Runtime on a CPU.
        engines: What is compiled; None: no engine.
    """

    precision: Precision
    opset: int
    prefill: bool
    labels: Mapping[str, int]
    cpu: bool
    engines: EnginePlan | None


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes and measures, all of it checked.

    Attributes:
        dtype: Floating point type of the folders.
        kinds: What reports call each file or folder that may be written, by its path.
        loads_not: Why plain transformers does not load `student/`; None: it does.
        graphs: Of the student; None: there are none.
        for_cpu: Of the student in a format of its own, of which `cpu.onnx` alone is kept; None: there is none.
        verified: How long and how graphs are compared with torch.
        benchmark: At the end; None: nothing is measured.
    """

    dtype: torch.dtype
    kinds: Mapping[str, str]
    loads_not: str | None
    graphs: GraphPlan | None
    for_cpu: GraphPlan | None
    verified: Extent
    benchmark: ShortBenchmark | None


def plan_export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: ExportSettings,
    for_cpu: PreTrainedModel | None = None,
) -> tuple[Variants, ExportPlan]:
    """Plan an export: see `export.pipeline.export_all`.

    Raises:
        ModuleNotFoundError, ValueError: Settings and model do not fit.
    """
    check_finite(model, "the model to export")
    tokens = label_token_ids(tokenizer, settings.labels) if settings.labels else []
    model = merged(model)
    if "hf" in settings.formats and settings.plain:
        check_plain(model)
    assert (settings.cpu_format is not None) == (for_cpu is not None)
    model = rounded(model, settings.dtype)
    for_cpu = None if for_cpu is None else rounded(for_cpu, settings.dtype)
    quantized = model if for_cpu is None else for_cpu
    wanted = settings.compressed is True or bool(quantized_linears(quantized) or cache_format(quantized))
    compressed = wanted and is_compressed(settings, partial(check_compressible, quantized))
    computed = model
    if settings.precision in UNQUANTIZED and quantized_linears(model):
        computed = rounded(without_quantizers(model, keep_cache=True), settings.dtype)
    if settings.graph:
        check_exportable(computed, precision=settings.precision, opset=settings.opset)
        if "engine" in settings.formats:
            check_engine_formats(formats_of(computed))
    if settings.cpu:
        _check_heads(model)
    if settings.cpu is True:
        check_cpu(settings.precision, settings.opset, cache_format(model))
    plan = _plan(settings, dict(zip(settings.labels, tokens, strict=True)), why_not_plain(model))
    return Variants(model, computed, for_cpu, quantized if compressed else None), plan


def _plan(settings: ExportSettings, labels: Mapping[str, int], loads_not: str | None) -> ExportPlan:
    precision, opset = settings.precision, settings.opset
    engines = graphs = for_cpu = benchmark = None
    if "engine" in settings.formats:
        sizes = Profile(settings.batch, settings.sequence, settings.past)
        engines = EnginePlan(settings.tensorrt, settings.targets, sizes)
    if settings.graph:
        graphs = GraphPlan(precision, opset, settings.prefill, labels, settings.cpu is True, engines)
    if settings.cpu_format is not None:
        for_cpu = GraphPlan(settings.cpu_format, opset, prefill=False, labels={}, cpu=True, engines=None)
    if settings.graph and settings.benchmark_repetitions:
        benchmark = ShortBenchmark(settings.benchmark_prompt, settings.benchmark_repetitions, settings.threads)
    verified = Extent(settings.decode_steps, settings.sequence[2], settings.threads)
    kinds = _kinds(settings, plain=loads_not is None)
    return ExportPlan(settings.dtype, kinds, loads_not, graphs, for_cpu, verified, benchmark)


def _kinds(settings: ExportSettings, *, plain: bool) -> dict[str, str]:
    precision, in_codes = settings.precision, settings.cpu_format or settings.precision
    kinds = {
        layout.COMPRESSED: f"compressed-tensors folder {'' if in_codes in UNQUANTIZED else in_codes}".rstrip(),
        layout.GRAPH: f"ONNX {precision}",
        layout.PREFILL_GRAPH: "ONNX, last position only, on the weights of model.onnx",
        layout.LABEL_GRAPH: f"ONNX, log-probabilities of {', '.join(settings.labels)}, on the weights of model.onnx",
        layout.CPU_GRAPH: f"ONNX {in_codes} for ONNX Runtime on a CPU",
        layout.ENGINE_SOURCE: f"ONNX {precision}, float16 between (what the engine was built from)",
        layout.ENGINE_LABEL_SOURCE: "the same for labels, on the weights of engine-source.onnx",
    }
    student = "Hugging Face folder" if plain else "student folder (Potstill loads it, plain transformers does not)"
    return {layout.STUDENT: student, **kinds} if "hf" in settings.formats else kinds


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `ValueError` for an output that is a file, has files where folders belong, or holds an export that shall stay."""
    for folder in (output, *(output / name for name in layout.FILES)):
        check_kind(folder, folder=True)
    for file in ("report.json", "report.md"):
        check_kind(output / file, folder=False)
    found = [] if overwrite else [path for pattern in layout.WRITTEN for path in sorted(output.glob(pattern))]
    if found:
        raise ValueError(
            f"expected an output folder without an export, found {found[0].relative_to(output).as_posix()} in "
            f"{str(output)!r}; choose another folder, or replace the export with --overwrite"
        )


def results_folder(output: Path, verification: Sequence[Mapping[str, Any]], *, overwrite: bool) -> Path:
    """Where the results are: what failed its verification never takes the place of an earlier export."""
    failed = any(check["status"] == "failed" for check in verification)
    return output / layout.FAILED if failed and overwrite else output


def check_formats(
    model: PreTrainedModel, settings: ExportSettings, formats: Mapping[str, str], kv_cache: str | None
) -> None:
    """Raise for formats of projections, by name, and of the cache that cannot be exported, before a model is quantized.

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
    if settings.cpu:
        _check_heads(model)
    if settings.cpu_format is not None and settings.compressed is True:
        formats = dict.fromkeys(quantize_decoder(model)["modules"], settings.cpu_format)
        check_compressible_formats(model, formats.items(), None)


def _check_heads(model: PreTrainedModel) -> None:
    width = decoder_layers(model)[0].head_dim
    if width % _HEAD_MULTIPLE:
        raise ValueError(
            f"expected attention heads of a multiple of {_HEAD_MULTIPLE} channels for a graph for the CPU, found "
            f"{width}, which ONNX Runtime's attention does not take; leave the graph out"
        )


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
            rank_zero_info(f"{layout.COMPRESSED}/ is left out: {error}")
            return False
        raise
    return True
