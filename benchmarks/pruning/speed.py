"""Speed of the students of the pruning study.  It depends on sizes alone, so every shape is timed once, beside the dense model.

The prefill of one prompt of 128 tokens with logits at all positions, in float32, in torch and in ONNX Runtime; runs of both models
take turns, see `models/pruning/budget/latency.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.pruning.latency import BACKENDS
from benchmarks.study import Row, Rows
from models.loading.reference import load_model
from models.pruning.budget.costs import flops, parameters
from models.pruning.budget.latency import Run, compare
from models.structure.shape import LayerShape, shape_of, sliced

BATCH, LENGTH = 1, 128
REPETITIONS = 30


def speeds(reference: str, rows: Sequence[Row], out: Path) -> list[Row]:
    """A row for every shape (`hidden`, `layers`) of the students: `torch`, `onnxruntime` (time over the dense model's), quartiles."""
    shapes = {(row["hidden"], tuple(map(tuple, row["layers"]))): row for row in reversed(rows)}
    settings = {"model": reference, "batch": BATCH, "length": LENGTH, "repetitions": REPETITIONS}
    store, found = Rows(out, ("torch", "transformers", "onnxruntime"), settings), []

    @cache
    def dense() -> tuple[PreTrainedModel, dict[str, Run]]:
        model = load_model(reference)
        return model, {backend: run(model, batch=BATCH, length=LENGTH) for backend, run in BACKENDS.items()}

    def make(row: Row, about: Row) -> Row:
        model, whole = dense()
        layers = tuple(LayerShape(*layer) for layer in row["layers"])
        shape = replace(shape_of(model), hidden=row["hidden"], layers=layers)
        costs = {"parameters": parameters(shape), "gflops": flops(shape, batch=BATCH, new=LENGTH) / 1e9}
        timed = {**about, **costs}
        for backend, run in BACKENDS.items():
            student = run(sliced(model, shape), batch=BATCH, length=LENGTH)
            latency = compare(whole[backend], student, repetitions=REPETITIONS)
            low, high = latency.spread
            timed |= {backend: latency.ratio, f"{backend}_low": low, f"{backend}_high": high}
            timed[f"{backend}_ms"] = 1e3 * latency.student_s
        return timed

    for row in (bar := tqdm(list(reversed(shapes.values())), desc="Speed", unit="shape")):
        bar.set_postfix_str(f"{row['cut']}: {row['arm']}")
        sizes = {"hidden": row["hidden"], "layers": row["layers"]}
        unequal = len({tuple(layer) for layer in row["layers"]}) > 1
        name = f"speed {row['cut']}{' per layer' if unequal else ''}"
        about = {"speed_of": row["cut"], "unequal_layers": unequal, **sizes}
        found.append(store.find_or_make(name, sizes, partial(make, row, about)))
    return found
