"""A second graph beside an exported one that returns the logits of the last position only; both share one file of weights.

For ranking and for the first token of an answer: see `export/onnx_graph/last_logits.py` for what it saves, and `export/serving/scorer.py` for its use.
"""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from export.layout import PREFILL
from export.onnx_graph.last_logits import keep_last_logits
from program.files import move_into_place, staging_folder


def write_prefill(graph: Path) -> Path:
    """Write `prefill.onnx` beside a graph of `export_onnx`; it reads that graph's weights, which must stay there."""

    def edit(model: ir.Model) -> None:
        keep_last_logits(model)
        model.metadata_props["logits"] = "last position"

    return write_beside(graph, PREFILL, edit)


def write_beside(graph: Path, name: str, edit: Callable[[ir.Model], None]) -> Path:
    """Write a changed version of a graph beside it; weights stay where they are, and both refer to them."""
    model = ir.load(graph)
    edit(model)
    target = graph.with_name(name)
    with staging_folder(graph.parent) as folder:
        ir.save(model, folder / name)
        move_into_place(folder / name, target)
    onnx.checker.check_model(str(target))
    return target
