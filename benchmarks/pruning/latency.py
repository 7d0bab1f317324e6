"""A latency budget: a student that takes a given share of its dense model's time, found and then measured afresh.

    python -m benchmarks.pruning.latency [--ratio 0.8] [--backend torch|onnxruntime] [--json FILE]

Every layer loses as many neurons and key/value groups, first units kept: quality is not the matter here, and speed does not depend on
the values of weights.  Both models run the prefill of the same tokens, in float32, in turns.
"""

import sys
from functools import partial

from benchmarks.harness import parser, report
from export.sessions.timed_prefill import onnx_run
from models.loading.reference import load_model
from models.pruning.budget.costs import flops, parameters
from models.pruning.budget.latency import Run, compare, meet_latency, torch_run
from models.pruning.budget.uniform import evenly_sparse
from models.structure.shape import Shape, shape_of, sliced
from program.screen import as_command

QUARTILES = ("ratio_lower_quartile", "ratio_upper_quartile")
BACKENDS = {"torch": torch_run, "onnxruntime": onnx_run}


def main() -> None:
    """Search, then build both models again and time them once more."""
    options = parser(__doc__, repetitions=15)
    options.add_argument("--model", default="package:smollm2-135m-instruct", help="model reference")
    text = "time of the student over the dense model's (default: 0.8)"
    options.add_argument("--ratio", type=float, default=0.8, help=text)
    options.add_argument("--backend", choices=BACKENDS, default="torch", help="what runs the models (default: torch)")
    options.add_argument("--batch", type=int, default=1, help="prompts at a time (default: 1)")
    options.add_argument("--length", type=int, default=128, help="tokens of a prompt (default: 128)")
    options.add_argument("--multiple", type=int, default=64, help="neurons kept are a multiple of this (default: 64)")
    arguments = options.parse_args()
    batch, length = arguments.batch, arguments.length
    model = load_model(arguments.model)
    dense = shape_of(model)

    def prepare(shape: Shape) -> Run:
        return BACKENDS[arguments.backend](sliced(model, shape), batch=batch, length=length)

    met = meet_latency(
        dense,
        partial(evenly_sparse, dense, measure=partial(flops, batch=batch, new=length), multiple=arguments.multiple),
        arguments.ratio,
        prepare=prepare,
        repetitions=arguments.repetitions,
    )
    fresh = compare(prepare(dense), prepare(met.shape), repetitions=2 * arguments.repetitions)
    results = []
    for name, shape, seconds, quartiles in (
        ("dense", dense, fresh.dense_s, (1.0, 1.0)),
        ("student", met.shape, fresh.student_s, fresh.spread),
    ):
        first = shape.layers[0]  # all layers are alike
        row = {"name": name, "median_s": seconds, **dict(zip(QUARTILES, quartiles, strict=True))}
        row |= {"parameters": parameters(shape), "gflops": flops(shape, batch=batch, new=length) / 1e9}
        row |= {"neurons": first.neurons, "kv_groups": first.kv_groups, "batch": batch, "length": length}
        results.append(row)
    ratios = {
        "asked": arguments.ratio,
        "student_time_over_dense": fresh.ratio,
        "student_time_over_dense_in_search": met.latency.ratio,
    }
    report(results, ratios, ["torch", "transformers", "onnxruntime"], arguments.json)


if __name__ == "__main__":
    sys.exit(as_command(main)())
