"""The whole export as one function: Hugging Face folder, ONNX, engine, verification, benchmark.

The files are those of `export/layout.py`.  Everything is checked before anything is written, is written under a temporary name,
and is moved into place at the end.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.label_prompts import label_token_ids
from export.benchmark.graphs import benchmark_onnx
from export.cpu_graph.to_cpu import HEAD_MULTIPLE, check_cpu, write_cpu_graph
from export.engine.write import Engines, write_engines
from export.folders.compressed import check_compressible, check_compressible_formats, save_compressed
from export.folders.student import check_plain, rounded, save_student, without_quantizers
from export.layout import (
    COMPRESSED,
    CPU_GRAPH,
    ENGINE_LABEL_SOURCE,
    ENGINE_SOURCE,
    FAILED,
    FILES,
    GRAPH,
    LABEL_GRAPH,
    PREFILL_GRAPH,
    STUDENT,
    WRITTEN,
)
from export.onnx_graph.labels import write_labels
from export.onnx_graph.prefill import write_prefill
from export.onnx_graph.to_onnx import UNQUANTIZED, check_engine_formats, check_exportable, export_onnx, formats_of
from export.phases import Phases
from export.settings import ExportSettings, check_settings
from export.verify import HeldOut, Verification, verify_artefacts
from export.verify.checks import Check
from export.verify.served import Served
from models.architecture import decoder_layers
from models.loading.contents import check_finite
from models.loading.student_folder import why_not_plain
from models.post_training.format_choice import formats_by_pattern
from models.quantization.cache import cache_format
from models.quantization.formats import FORMATS
from models.quantization.linear import FakeQuantizedLinear, quantized_linears
from models.structure.adapters import merged
from program.files import check_kind, folder_bytes, foreign_files, move_into_place, only_one, staging_folder


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


def export_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    settings: ExportSettings,
    prompts: Mapping[str, Tensor],
    *,
    held_out: HeldOut | None = None,
    for_cpu: PreTrainedModel | None = None,
    compare: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    phases: Phases | None = None,
) -> dict[str, Any]:
    """Export, verify and measure a student; a verification that fails is reported, not raised: see `raise_on_failure`.

    Args:
        model: The student on the CPU, float32; it is not changed.
        tokenizer: Saved with the Hugging Face folder.
        output: Folder to write into; other files in it are left alone.
        settings: What to export.
        prompts: `prompt_ids` (B, P), left padded, and `prompt_mask` (B, P) for the verification.
        held_out: Conversations on which graphs are judged as they are served; None: answers that the student samples.
        for_cpu: The student in the format that `settings.cpu` names, see `requantized`; None where it names none.
        compare: Further graphs (of the teacher) to measure in turns with the new ones, by name.
        overwrite: Replace what an earlier export wrote, unless the verification fails: then the results go into `failed/`.
        phases: Show the progress; by default new ones.

    Returns:
        `artefacts` (path in `output`, bytes, kind), `verification`, `served` (a row for each graph), `benchmark`, `not_measured` (rows with a `reason`), `engine`, `label_engine`, `versions`, `seconds` of each
        phase.

    Raises:
        ValueError, ModuleNotFoundError: Settings, model and output do not fit; found before anything is written.
    """
    check_settings(settings)
    check_output(output, overwrite=overwrite)
    check_finite(model, "the model to export")
    labels = label_tokens(tokenizer, settings.labels)
    model = merged(model)
    if "hf" in settings.formats and settings.plain:
        check_plain(model)
    assert (settings.cpu_format is not None) == (for_cpu is not None)
    model = rounded(model, settings.dtype)
    for_cpu = None if for_cpu is None else rounded(for_cpu, settings.dtype)
    in_codes = model if for_cpu is None else for_cpu
    is_quantized = bool(quantized_linears(in_codes) or cache_format(in_codes))
    compressed = (is_quantized or settings.compressed is True) and is_compressed(
        settings, partial(check_compressible, in_codes)
    )
    computed = _plain(model, settings) if settings.precision in UNQUANTIZED else model
    if settings.graph:
        check_exportable(computed, precision=settings.precision, opset=settings.opset)
        if "engine" in settings.formats:
            check_engine_formats(formats_of(computed))
    check_cpu_model(model, settings)
    if settings.cpu and for_cpu is None:
        check_cpu(settings.precision, settings.opset, cache_format(model))

    reason = why_not_plain(model)
    phases = phases or Phases()
    with only_one(output), staging_folder(output) as staging:
        check_output(output, overwrite=overwrite)  # another export may have ended meanwhile
        if "hf" in settings.formats:
            with phases.phase("Student folder"):
                save_student(model, tokenizer, staging / STUDENT, dtype=settings.dtype)
            if reason is not None:
                rank_zero_info(f"{STUDENT}/ loads through Potstill only, not in plain transformers: it has {reason}")
        if compressed:
            with phases.phase("Compressed folder"):
                save_compressed(in_codes, tokenizer, staging / COMPRESSED, dtype=settings.dtype)
            if isinstance(in_codes.get_output_embeddings(), FakeQuantizedLinear):
                rank_zero_info(
                    f"{COMPRESSED}/ has a quantized head: ask it something before you serve it, not every server reads the codes"
                )
        engines = _write_graphs(computed, staging, settings, labels, phases) if settings.graph else None
        checks: list[Check] = []
        served: dict[str, Served] = {}
        benchmark: list[dict[str, Any]] = []
        if settings.graph:
            itself = replace(settings, cpu=settings.cpu is True)
            found = verify_artefacts(computed, staging, engines, itself, prompts, phases, held_out)
            checks, served = found.checks, found.served
            if for_cpu is not None:
                found = _write_for_cpu(for_cpu, staging, settings, prompts, phases, held_out)
                checks, served = checks + found.checks, served | {"student_cpu": found.served["student_cpu"]}
            if settings.benchmark_repetitions:
                benchmark = _benchmark(staging, settings, compare or {}, phases)
        verification = [check.as_dict() for check in checks]
        output = results_folder(output, verification, overwrite=overwrite)
        if output.name == FAILED:
            rank_zero_info(
                f"An earlier export in {output.parent} stays as it is; what failed its verification is in {output}"
            )
        output.mkdir(exist_ok=True)
        _move(staging, output)
    engines = engines.moved(output / "engine") if engines else None
    return {
        "artefacts": _artefacts(output, settings, engines, plain=reason is None),
        "verification": verification,
        "served": [{"name": name, **found.figures()} for name, found in served.items()],
        "benchmark": [row for row in benchmark if "reason" not in row],
        "not_measured": [row for row in benchmark if "reason" in row],
        "engine": engines.model.as_dict() if engines else None,
        "label_engine": engines.labels.as_dict() if engines and engines.labels else None,
        "versions": _versions(engines),
        "seconds": phases.seconds,
    }


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


def label_tokens(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> dict[str, int]:
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


def _write_graphs(
    model: PreTrainedModel, staging: Path, settings: ExportSettings, labels: Mapping[str, int], phases: Phases
) -> Engines | None:
    precision = settings.precision
    with phases.phase(f"ONNX {precision}"):
        export_onnx(model, staging / GRAPH, precision=precision, opset=settings.opset)
        if settings.prefill:
            write_prefill(staging / GRAPH)
        if labels:
            write_labels(staging / GRAPH, labels)
    if settings.cpu is True:
        with phases.phase(f"ONNX {precision} for the CPU"):
            write_cpu_graph(staging / GRAPH)
    if "engine" not in settings.formats:
        return None
    return write_engines(model, staging, settings, labels, phases)


def _write_for_cpu(
    model: PreTrainedModel,
    staging: Path,
    settings: ExportSettings,
    prompts: Mapping[str, Tensor],
    phases: Phases,
    held_out: HeldOut | None,
) -> Verification:
    """Write `cpu.onnx` of a student in a format of its own; the graph that it is made from goes."""
    assert settings.cpu_format is not None
    own = replace(settings, precision=settings.cpu_format, formats=("onnx",), cpu=True, labels=())
    with staging_folder(staging) as folder:
        _write_graphs(model, folder, own, {}, phases)
        (folder / GRAPH).unlink()
        found = verify_artefacts(model, folder, None, own, prompts, phases, held_out)
        for path in (CPU_GRAPH, f"{CPU_GRAPH}.data"):
            move_into_place(folder / path, staging / path)
    return found


def _benchmark(
    staging: Path, settings: ExportSettings, compare: Mapping[str, Path], phases: Phases
) -> list[dict[str, Any]]:
    written = {"student": GRAPH} | ({"student_cpu": CPU_GRAPH} if settings.cpu else {})
    graphs = {**compare, **{name: staging / path for name, path in written.items()}}
    with phases.phase("Benchmark in ONNX Runtime", len(graphs) * (settings.benchmark_repetitions + 1)) as on_step:
        rows = benchmark_onnx(
            graphs,
            prompt_tokens=settings.benchmark_prompt,
            repetitions=settings.benchmark_repetitions,
            threads=settings.threads,
            on_step=on_step,
        )
    for row in rows:
        if "reason" in row:
            rank_zero_info(f"Not measured: {row['name']}: {row['reason']}")
    return [row | {"path": written.get(row["name"], row["path"])} for row in rows]


def _move(staging: Path, output: Path) -> None:
    """Put each folder that was written in place of what an earlier export wrote; other files in it stay."""
    written = [name for name in FILES if (staging / name).exists()]
    for name in FILES:
        others = foreign_files(output / name, FILES[name])
        if others:
            rank_zero_info(f"Kept in {output / name}: {', '.join(map(str, others))}")
    for name in written:
        move_into_place(staging / name, output / name, ours=FILES[name])
    for name in FILES.keys() - written:  # last: what the earlier export wrote beyond this one
        if (output / name).exists():
            (staging / name).mkdir()
            move_into_place(staging / name, output / name, ours=FILES[name])
            with suppress(OSError):  # somebody else's files are in it
                (output / name).rmdir()


def _artefacts(output: Path, settings: ExportSettings, engines: Engines | None, *, plain: bool) -> list[dict[str, Any]]:
    def artefact(path: str, kind: str) -> dict[str, Any]:
        files = [output / path, output / f"{path}.data"]
        return {"path": path, "bytes": sum(folder_bytes(file) for file in files if file.exists()), "kind": kind}

    folder = "Hugging Face folder" if plain else "student folder (Potstill loads it, plain transformers does not)"
    rows = [artefact(STUDENT, folder)] if "hf" in settings.formats else []
    if (output / COMPRESSED).exists():
        format = settings.cpu_format or ("" if settings.precision in UNQUANTIZED else settings.precision)
        rows.append(artefact(COMPRESSED, f"compressed-tensors folder {format}".rstrip()))
    if settings.graph:
        rows.append(artefact(GRAPH, f"ONNX {settings.precision}"))
    if settings.prefill:
        rows.append(artefact(PREFILL_GRAPH, "ONNX, last position only, on the weights of model.onnx"))
    if settings.labels:
        words = f"ONNX, log-probabilities of {', '.join(settings.labels)}, on the weights of model.onnx"
        rows.append(artefact(LABEL_GRAPH, words))
    if settings.cpu:
        kind = f"ONNX {settings.cpu_format or settings.precision} for ONNX Runtime on a CPU"
        rows.append(artefact(CPU_GRAPH, kind))
    if (output / ENGINE_SOURCE).exists():
        rows.append(
            artefact(ENGINE_SOURCE, f"ONNX {settings.precision}, float16 between (what the engine was built from)")
        )
    if (output / ENGINE_LABEL_SOURCE).exists():
        rows.append(artefact(ENGINE_LABEL_SOURCE, "the same for labels, on the weights of engine-source.onnx"))
    if engines is not None:
        rows += [
            artefact(f"engine/{engine.path.name}", f"{engine.flavour} engine {settings.precision}{title}")
            for title, engine in engines.titled()
        ]
    return rows


def _versions(engines: Engines | None) -> dict[str, str]:
    packages: Sequence[str] = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {name: version(name) for name in packages} | (
        {engines.model.flavour: engines.model.version} if engines else {}
    )
