"""The engines of an export: one that generates and, with labels, one that answers a prompt in a single step.

Each holds all weights of the student: TensorRT shares none between engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from export.engine.to_tensorrt import (
    Engine,
    Flavour,
    Profile,
    build_engine,
    default_profiles,
    import_tensorrt,
    label_profiles,
)
from export.layout import LABEL_ENGINE_NAME, MODEL_ENGINE_NAME
from export.phases import Phases


@dataclass(frozen=True)
class EnginePlan:
    """What is compiled: by which package, for which GPUs, for which sizes; see `ExportSettings`."""

    flavour: Flavour
    targets: tuple[str, ...]
    sizes: Profile


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


def write_engines(plan: EnginePlan, graph: Path, label_graph: Path | None, folder: Path, phases: Phases) -> Engines:
    """Compile a graph and, if there is one, its graph for labels into a folder."""
    flavour, target = import_tensorrt(plan.flavour).__name__, "+".join(plan.targets) or "portable"

    def build(graph: Path, name: str, profiles: Sequence[Profile], title: str) -> Engine:
        path = folder / f"{name}-{flavour}-{target}.engine"
        with phases.phase(f"{title} ({flavour}, {target})"):
            return build_engine(graph, path, profiles=profiles, compute_capabilities=plan.targets, flavour=plan.flavour)

    generating = build(graph, MODEL_ENGINE_NAME, default_profiles(plan.sizes), "Engine")
    if label_graph is None:
        return Engines(generating)
    return Engines(generating, build(label_graph, LABEL_ENGINE_NAME, label_profiles(plan.sizes), "Engine for labels"))
