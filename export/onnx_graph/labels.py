"""A further graph beside an exported one that returns log-probabilities of a few label tokens; both share one file of weights.

For ranking and classification: how likely is each label, among all tokens, right behind the prompt?  Inputs and the cache are those of
the other graph, so prefixes can be shared (`export/serving/scorer.py`); (B, V) logits never leave the runtime.

Letters: B batch, V vocabulary, C labels.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.layout import LABELS
from export.onnx_graph.edits import Inserter
from export.onnx_graph.last_logits import keep_last_logits
from export.onnx_graph.prefill import write_beside

LOG_PROBS = "log_probs"
LABEL_TOKENS = "label_tokens"
METADATA = "labels"  # token by label, in the order of the columns, as JSON


def write_labels(graph: Path, tokens: Mapping[str, int], name: str = LABELS) -> Path:
    """Write a graph for labels beside one of `export_onnx`; it reads the weights of that graph, which must stay where they are.

    Args:
        graph: The file, its weights beside it.
        tokens: The token of each label, see `datamodules.label_prompts.label_token_ids`.
        name: Of the new file.

    Returns:
        The new file, of a few hundred kilobytes.  In the place of logits it has `log_probs` (B, C) in float32.
    """

    def edit(model: ir.Model) -> None:
        keep_label_log_probs(model, list(tokens.values()))
        model.metadata_props[METADATA] = json.dumps(dict(tokens))

    return write_beside(graph, name, edit)


def keep_label_log_probs(model: ir.Model, token_ids: Sequence[int]) -> None:
    """Turn the logits of a graph, in place, into log-probabilities (B, C) of these tokens behind the last position."""
    keep_last_logits(model)
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    make = Inserter(graph)
    exact = make.node("Cast", [logits], ir.AttrInt64("to", ir.DataType.FLOAT))
    every = make.node("LogSoftmax", [exact], ir.AttrInt64("axis", -1))
    columns = make.constant(LABEL_TOKENS, np.array(token_ids, np.int64))
    some = make.node("Gather", [every, columns], ir.AttrInt64("axis", -1))
    found = make.node("Squeeze", [some, make.constant("label_position", np.array([1], np.int64))])
    assert logits.shape is not None
    found.name, found.type = LOG_PROBS, ir.TensorType(ir.DataType.FLOAT)
    found.shape = ir.Shape([logits.shape[0], len(token_ids)])
    graph.outputs[graph.outputs.index(logits)] = found
