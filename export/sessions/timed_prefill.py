"""Latency of a model's prefill in ONNX Runtime on the CPU, for the budgets of `models/pruning/budget/latency.py`.

Legend: B prompts, T tokens.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from export.onnx_graph.to_onnx import Precision, export_onnx
from export.sessions.onnx_session import OnnxSession
from models.pruning.budget.latency import Run


def onnx_run(
    model: PreTrainedModel, *, batch: int, length: int, precision: Precision = "fp32", threads: int | None = None
) -> Run:
    """Export a model to a temporary folder and load the graph, with so many threads (None: ONNX Runtime's choice).

    Returns:
        One prefill of prompts of this length, from an empty cache to logits at all positions.

    Raises:
        ValueError: The model cannot be exported in this precision.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, precision=precision)
        session = OnnxSession(path, threads=threads)  # keeps the weights, also when their file has gone
    ids_BT = torch.ones(batch, length, dtype=torch.long)
    return lambda: session.run(ids_BT, ids_BT)
