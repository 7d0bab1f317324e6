"""The whole export as one function: Hugging Face folder, ONNX, engine, verification, benchmark.

The files are those of `export/layout.py`.  Everything is checked before anything is written (`export/plan.py`), is
written under a temporary name, and is moved into place at the end.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from export import layout
from export.benchmark.graphs import ShortBenchmark
from export.cpu_graph.to_cpu import write_cpu_graph
from export.engine.write import Engines, write_engines
from export.folders.compressed import save_compressed
from export.folders.student import save_student
from export.onnx_graph.labels import write_labels
from export.onnx_graph.prefill import write_prefill
from export.onnx_graph.to_onnx import UNQUANTIZED, export_onnx
from export.phases import Phases
from export.plan import ExportPlan, GraphPlan, Variants, check_output, plan_export, results_folder
from export.settings import ExportSettings
from export.verify import HeldOut, Verification, verify_artefacts
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
        `artefacts` (path in `output`, bytes, kind), `verification`, `served` (a row for each graph), `benchmark`,
        `not_measured` (rows with a `reason`), `engine`, `label_engine`, `versions`, `seconds` of each phase.

    Raises:
        ValueError, ModuleNotFoundError: Settings, model and output do not fit; found before anything is written.
    """
    check_output(output, overwrite=overwrite)
    variants, plan = plan_export(model, tokenizer, settings, for_cpu)
    del model, for_cpu  # what was rounded needs no memory any more
    phases = phases or Phases()
    verify = partial(verify_artefacts, extent=plan.verified, prompts=prompts, phases=phases, held_out=held_out)
    engines, found, benchmark = None, Verification([], {}), list[dict[str, Any]]()
    with only_one(output), staging_folder(output) as staging:
        check_output(output, overwrite=overwrite)  # another export may have ended meanwhile
        _write_folders(plan, variants, tokenizer, staging, phases)
        if plan.graphs is not None:
            engines = _write_graphs(variants.computed, plan.graphs, staging, phases)
            found = verify(variants.computed, staging, engines, plan.graphs.precision)
        if variants.for_cpu is not None and plan.for_cpu is not None:
            own = _write_for_cpu(variants.for_cpu, plan.for_cpu, staging, verify, phases)
            found = Verification(found.checks + own.checks, found.served | own.served)
        if plan.benchmark is not None:
            benchmark = _benchmark(plan.benchmark, staging, compare or {}, phases)
        verification = [check.as_dict() for check in found.checks]
        output = results_folder(output, verification, overwrite=overwrite)
        if output.name == layout.FAILED:
            rank_zero_info(
                f"An earlier export in {output.parent} stays as it is; what failed its verification is in {output}"
            )
        output.mkdir(exist_ok=True)
        _move(staging, output)
    engines = engines.moved(output / "engine") if engines else None
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    built = {engines.model.flavour: engines.model.version} if engines else {}
    return {
        "artefacts": _artefacts(output, plan, engines),
        "verification": verification,
        "served": [{"name": name, **served.figures()} for name, served in found.served.items()],
        "benchmark": [row for row in benchmark if "reason" not in row],
        "not_measured": [row for row in benchmark if "reason" in row],
        "engine": engines.model.as_dict() if engines else None,
        "label_engine": engines.labels.as_dict() if engines and engines.labels else None,
        "versions": {name: version(name) for name in packages} | built,
        "seconds": phases.seconds,
    }


def _write_folders(
    plan: ExportPlan, variants: Variants, tokenizer: PreTrainedTokenizerBase, staging: Path, phases: Phases
) -> None:
    if layout.STUDENT in plan.kinds:
        with phases.phase("Student folder"):
            save_student(variants.student, tokenizer, staging / layout.STUDENT, dtype=plan.dtype)
        if plan.loads_not is not None:
            rank_zero_info(
                f"{layout.STUDENT}/ loads through Potstill only, not in plain transformers: it has {plan.loads_not}"
            )
    if variants.in_codes is not None:
        with phases.phase("Compressed folder"):
            save_compressed(variants.in_codes, tokenizer, staging / layout.COMPRESSED, dtype=plan.dtype)
        if isinstance(variants.in_codes.get_output_embeddings(), FakeQuantizedLinear):
            rank_zero_info(
                f"{layout.COMPRESSED}/ has a quantized head: ask it something before you serve it, not every server reads "
                "the codes"
            )


def _write_graphs(model: PreTrainedModel, graphs: GraphPlan, folder: Path, phases: Phases) -> Engines | None:
    """Write all graphs of a model; compile them, those of a quantized one again with float16 between its products."""
    precision, opset = graphs.precision, graphs.opset
    source, label_source = folder / layout.GRAPH, folder / layout.LABEL_GRAPH
    with phases.phase(f"ONNX {precision}"):
        export_onnx(model, source, precision=precision, opset=opset)
        if graphs.prefill:
            write_prefill(source)
        if graphs.labels:
            write_labels(source, graphs.labels)
    if graphs.cpu:
        with phases.phase(f"ONNX {precision} for the CPU"):
            write_cpu_graph(source)
    if graphs.engines is None:
        return None
    if precision not in UNQUANTIZED:
        source, label_source = folder / layout.ENGINE_SOURCE, folder / layout.ENGINE_LABEL_SOURCE
        with phases.phase(f"ONNX {precision}, float16 between (for the engine)"):
            export_onnx(model, source, precision=precision, opset=opset, activations="float16")
            if graphs.labels:
                write_labels(source, graphs.labels, label_source.name)
    return write_engines(graphs.engines, source, label_source if graphs.labels else None, folder / "engine", phases)


def _write_for_cpu(
    model: PreTrainedModel, graphs: GraphPlan, staging: Path, verify: Callable[..., Verification], phases: Phases
) -> Verification:
    """Write `cpu.onnx` of a student in a format of its own; the graph that it is made from goes."""
    with staging_folder(staging) as folder:
        _write_graphs(model, graphs, folder, phases)
        (folder / layout.GRAPH).unlink()
        found = verify(model, folder, None, graphs.precision)
        for path in (layout.CPU_GRAPH, f"{layout.CPU_GRAPH}.data"):
            move_into_place(folder / path, staging / path)
    return found


def _benchmark(
    short: ShortBenchmark, staging: Path, compare: Mapping[str, Path], phases: Phases
) -> list[dict[str, Any]]:
    named = {"student": layout.GRAPH, "student_cpu": layout.CPU_GRAPH}
    written = {name: path for name, path in named.items() if (staging / path).exists()}
    graphs = {**compare, **{name: staging / path for name, path in written.items()}}
    with phases.phase("Benchmark in ONNX Runtime", len(graphs) * (short.repetitions + 1)) as on_step:
        rows = short.measure(graphs, on_step)
    for row in rows:
        if "reason" in row:
            rank_zero_info(f"Not measured: {row['name']}: {row['reason']}")
    return [row | {"path": written.get(row["name"], row["path"])} for row in rows]


def _move(staging: Path, output: Path) -> None:
    """Put each folder that was written in place of what an earlier export wrote; other files in it stay."""
    written = [name for name in layout.FILES if (staging / name).exists()]
    for name in layout.FILES:
        others = foreign_files(output / name, layout.FILES[name])
        if others:
            rank_zero_info(f"Kept in {output / name}: {', '.join(map(str, others))}")
    for name in written:
        move_into_place(staging / name, output / name, ours=layout.FILES[name])
    for name in layout.FILES.keys() - written:  # last: what the earlier export wrote beyond this one
        if (output / name).exists():
            (staging / name).mkdir()
            move_into_place(staging / name, output / name, ours=layout.FILES[name])
            with suppress(OSError):  # somebody else's files are in it
                (output / name).rmdir()


def _artefacts(output: Path, plan: ExportPlan, engines: Engines | None) -> list[dict[str, Any]]:
    kinds = dict(plan.kinds)
    if engines is not None and plan.graphs is not None:
        for title, engine in engines.titled():
            kinds[f"engine/{engine.path.name}"] = f"{engine.flavour} engine {plan.graphs.precision}{title}"
    rows = []
    for path, kind in kinds.items():
        files = [file for file in (output / path, output / f"{path}.data") if file.exists()]
        rows += [{"path": path, "bytes": sum(map(folder_bytes, files)), "kind": kind}] if files else []
    return rows


def export_baseline(teacher: PreTrainedModel, output: Path, opset: int, phases: Phases) -> list[dict[str, Any]]:
    """Write the float32 graph of a teacher into `baseline/`: what size and speed of a student are compared with.

    Returns:
        Its row among the artefacts.
    """
    graph = output / "baseline" / layout.GRAPH
    graph.parent.mkdir(parents=True, exist_ok=True)
    with phases.phase("Teacher: ONNX fp32"):
        written = export_onnx(teacher, graph, precision="fp32", opset=opset)
    return [{"path": graph.relative_to(output).as_posix(), "bytes": written.bytes, "kind": "teacher, ONNX fp32"}]
