"""Speed, memory and size of exports side by side, each artefact in a process of its own.

    python -m export.benchmark DIR... [--prompts 128 512] [--batches 1 4 16] [--new-tokens 32] [--repetitions 5]
                               [--threads N] [--runtimes torch onnx engine] [--json FILE] [--plot FILE.png]

The command measures the student's folder in torch, the graph in ONNX Runtime and the engine:
time to first token over prompt lengths, time per output token and tokens per second over batch sizes, peak memory, size on
disk, and energy where the machine has a counter.  `export.benchmark.graphs` is the short form at the end of an export.

Artefacts take turns in every repetition, so that a change of the machine's load meets all of them; medians are reported with the
smallest and largest value.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.benchmark.artefacts import RUNTIMES, find_artefacts
from export.benchmark.energy import find_counters
from export.benchmark.report import machine, plot, text, versions
from export.benchmark.turns import cells, compare
from program.files import check_kind, write_file
from program.options import Parser, positive, up_to
from program.progress import Bar
from program.screen import as_command

PICTURES = (".png", ".pdf", ".svg")


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every artefact was measured at one place or more."""
    options = _parser().parse_args(arguments)
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"expected a folder to write {path.name} into, found none at {str(path.parent)!r}; create it"
            )
        if path is not None:
            check_kind(path, folder=False)
    if options.plot is not None and options.plot.suffix not in PICTURES:
        raise ValueError(
            f"expected a picture's name with {' or '.join(PICTURES)}, found {options.plot.name!r}; rename it"
        )
    result = _benchmark(options)
    print(text(result))
    if options.json is not None:
        write_file(options.json, lambda path: path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8"))
    measured = {row["name"] for row in result["rows"] if "reason" not in row}
    if options.plot is not None and measured:
        write_file(options.plot, lambda path: plot(result, path))
    return 0 if all(artefact["name"] in measured for artefact in result["artefacts"]) else 2


def _benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """`settings`, `artefacts`, `skipped`, `rows`, `energy`, `machine` and `versions`."""
    artefacts, skipped = find_artefacts(options.folders, options.runtimes)
    grid = cells(options.prompts, options.batches, options.new_tokens)
    counters, reason = find_counters()
    total = len(artefacts) * len(grid) * (options.repetitions + 1)
    with Bar(total=total, desc="Benchmark", unit="measurements") as bar:

        def step() -> None:
            bar.update()

        rows = compare(artefacts, grid, repetitions=options.repetitions, threads=options.threads, on_step=step)
    return {
        "settings": {
            name: getattr(options, name) for name in ("prompts", "batches", "new_tokens", "repetitions", "threads")
        },
        "artefacts": [artefact.as_dict() for artefact in artefacts],
        "skipped": skipped,
        "rows": rows,
        "energy": {"reason": reason} if reason else {"counters": [counter.name for counter in counters]},
        "machine": machine(),
        "versions": versions(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m export.benchmark",
        description="Measure export folders side by side: torch, ONNX Runtime and TensorRT; speed, memory, size and energy.",
    )
    add = parser.add_argument
    add(
        "folders", metavar="DIR", nargs="+", type=Path, help="what `python -m export --output DIR` or a run has written"
    )
    add("--prompts", type=positive, nargs="+", default=[128, 512], metavar="N", help="prompt lengths, tokens")
    add("--batches", type=up_to(4096), nargs="+", default=[1, 4, 16], metavar="N", help="conversations at a time")
    add("--new-tokens", type=positive, default=32, metavar="N", help="tokens after the first (default: %(default)s)")
    add("--repetitions", type=up_to(10_000), default=5, metavar="N", help="counted ones (default: %(default)s)")
    add("--threads", type=up_to(1024), metavar="N", help="threads on the CPU (default: each runtime's choice)")
    add("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="what to measure (default: all)")
    add("--json", type=Path, metavar="FILE", help="write all figures, the machine and versions to this file")
    add("--plot", type=Path, metavar="FILE.png", help="write a picture to this file (or .pdf, .svg)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
