"""The whole export as one function: Hugging Face folder, ONNX, engine, verification, benchmark.

The files are those of `export/layout.py`.  Everything is checked before anything is written, is written under a temporary name,
and is moved into place at the end.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from export.benchmark.graphs import benchmark_onnx
from export.cpu_graph.to_cpu import write_cpu_graph
from export.engine.write import Engines, write_engines
from export.folders.compressed import save_compressed
from export.folders.student import save_student
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
)
from export.onnx_graph.labels import write_labels
from export.onnx_graph.prefill import write_prefill
from export.onnx_graph.to_onnx import UNQUANTIZED, export_onnx
from export.phases import Phases
from export.plan import ExportPlan, check_output, plan_export, results_folder
from export.settings import ExportSettings
from export.verify import HeldOut, Verification, verify_artefacts
from export.verify.checks import Check
from export.verify.served import Served
from models.loading.student_folder import why_not_plain
from models.quantization.linear import FakeQuantizedLinear
from program.files import folder_bytes, foreign_files, move_into_place, only_one, staging_folder


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
    check_output(output, overwrite=overwrite)
    plan = plan_export(model, tokenizer, settings, for_cpu)
    del model, for_cpu  # what was rounded needs no memory any more
    phases = phases or Phases()
    with only_one(output), staging_folder(output) as staging:
        check_output(output, overwrite=overwrite)  # another export may have ended meanwhile
        _write_folders(plan, tokenizer, staging, phases)
        engines = _write_graphs(plan.computed, staging, settings, plan.labels, phases) if settings.graph else None
        checks: list[Check] = []
        served: dict[str, Served] = {}
        benchmark: list[dict[str, Any]] = []
        if settings.graph:
            itself = replace(settings, cpu=settings.cpu is True)
            found = verify_artefacts(plan.computed, staging, engines, itself, prompts, phases, held_out)
            checks, served = found.checks, found.served
            if plan.for_cpu is not None:
                found = _write_for_cpu(plan.for_cpu, staging, settings, prompts, phases, held_out)
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
        "artefacts": _artefacts(output, settings, engines, plain=why_not_plain(plan.student) is None),
        "verification": verification,
        "served": [{"name": name, **found.figures()} for name, found in served.items()],
        "benchmark": [row for row in benchmark if "reason" not in row],
        "not_measured": [row for row in benchmark if "reason" in row],
        "engine": engines.model.as_dict() if engines else None,
        "label_engine": engines.labels.as_dict() if engines and engines.labels else None,
        "versions": _versions(engines),
        "seconds": phases.seconds,
    }


def _write_folders(plan: ExportPlan, tokenizer: PreTrainedTokenizerBase, staging: Path, phases: Phases) -> None:
    dtype, reason = plan.settings.dtype, why_not_plain(plan.student)
    if "hf" in plan.settings.formats:
        with phases.phase("Student folder"):
            save_student(plan.student, tokenizer, staging / STUDENT, dtype=dtype)
        if reason is not None:
            rank_zero_info(f"{STUDENT}/ loads through Potstill only, not in plain transformers: it has {reason}")
    if plan.in_codes is not None:
        with phases.phase("Compressed folder"):
            save_compressed(plan.in_codes, tokenizer, staging / COMPRESSED, dtype=dtype)
        if isinstance(plan.in_codes.get_output_embeddings(), FakeQuantizedLinear):
            rank_zero_info(
                f"{COMPRESSED}/ has a quantized head: ask it something before you serve it, not every server reads the codes"
            )


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
