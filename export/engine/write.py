"""The engines of an export: one that generates and, with labels, one that answers a prompt in a single step.

Each holds all weights of the student: TensorRT shares none between engines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from export.engine.to_tensorrt import Engine, Profile, build_engine, default_profiles, import_tensorrt, label_profiles
from export.layout import ENGINE_LABEL_SOURCE, ENGINE_SOURCE, GRAPH, LABEL_ENGINE_NAME, LABEL_GRAPH, MODEL_ENGINE_NAME
from export.onnx_graph.labels import write_labels
from export.onnx_graph.to_onnx import UNQUANTIZED, export_onnx
from export.phases import Phases
from export.settings import ExportSettings


@dataclass(frozen=True)
class Engines:
    """What was compiled.

    Attributes:
        model: Returns logits.
        labels: Returns log-probabilities of labels, if any were asked for.
    """

    model: Engine
    labels: Engine | None = None

    def titled(self) -> list[tuple[str, Engine]]:
        """Those that are there, each with what reports add to its precision."""
        return [("", self.model), *([(", labels", self.labels)] if self.labels else [])]

    def moved(self, folder: Path) -> "Engines":
        """The same with their files in another folder."""
        model, *labels = (replace(engine, path=folder / engine.path.name) for _, engine in self.titled())
        return Engines(model, *labels)


def write_engines(
    model: PreTrainedModel, folder: Path, settings: ExportSettings, labels: Mapping[str, int], phases: Phases
) -> Engines:
    """Compile the graphs of an export, those of a quantized student once more with float16 between its products.

    Args:
        model: What the graphs compute.
        folder: Has the graphs, see `export/layout.py`.
        settings: What to export.
        labels: The token of each label; none: no engine for labels.
        phases: Show the progress.
    """
    source, label_source = folder / GRAPH, folder / LABEL_GRAPH
    if settings.precision not in UNQUANTIZED:
        source, label_source = folder / ENGINE_SOURCE, folder / ENGINE_LABEL_SOURCE
        with phases.phase(f"ONNX {settings.precision}, float16 between (for the engine)"):
            export_onnx(model, source, precision=settings.precision, opset=settings.opset, activations="float16")
            if labels:
                write_labels(source, labels, label_source.name)
    flavour = import_tensorrt(settings.tensorrt).__name__
    target = "+".join(settings.targets) or "portable"

    def build(graph: Path, name: str, profiles: Sequence[Profile], title: str) -> Engine:
        with phases.phase(f"{title} ({flavour}, {target})"):
            return build_engine(
                graph,
                folder / "engine" / f"{name}-{flavour}-{target}.engine",
                profiles=profiles,
                compute_capabilities=settings.targets,
                flavour=settings.tensorrt,
            )

    sizes = settings.batch, settings.sequence, settings.past
    generating = build(source, MODEL_ENGINE_NAME, default_profiles(*sizes), "Engine")
    if not labels:
        return Engines(generating)
    return Engines(generating, build(label_source, LABEL_ENGINE_NAME, label_profiles(*sizes), "Engine for labels"))
