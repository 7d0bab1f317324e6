"""Shared by all benchmarks: both sides in one run and in turns, medians with their spread, versions, and `--json`.

The JSON object has `results` (a list of rows), `ratios` (names to numbers, this project over the reference) and `versions`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.hardware.interleave import interleave
from program.files import write_file
from program.options import Parser, up_to

MISSING = "expected the package `{}` to compare with, found none; run `pip install -e .[bench]`"

__all__ = ["MISSING", "interleave", "parser", "report", "spread"]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, in seconds."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def parser(description: str | None, *, repetitions: int | None = 5, out: str | None = None) -> argparse.ArgumentParser:
    """The options of every benchmark.

    Args:
        description: The module's docstring.
        repetitions: Of each side where nothing else is asked; None: nothing is repeated.
        out: Where a study keeps its rows where nothing else is asked, without the suffix; None: it is no study.
    """
    module = sys.modules["__main__"].__spec__
    command = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    options = Parser(command, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repetitions is not None:
        number, text = up_to(10_000, least=0), "counted repetitions of each side (default: %(default)s)"
        options.add_argument("--repetitions", type=number, default=repetitions, help=text)
    if out is not None:
        text = "where rows and pictures are kept (default: %(default)s)"
        options.add_argument("--out", type=Path, default=Path(out), help=text)
    options.add_argument("--json", type=Path, metavar="FILE", help="write results, ratios and versions to this file")
    return options


def report(results: list[dict[str, Any]], ratios: dict[str, float], packages: Sequence[str], path: Path | None) -> None:
    """Print rows, ratios and versions, and write them if a file was named."""
    versions = {"python": platform.python_version(), "cpus": str(os.cpu_count())}
    versions |= {package: version(package) for package in packages}
    for row in results:
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print("  ".join(f"{key} {value}" for key, value in shown.items()))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x")
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    if path:
        text = json.dumps({"results": results, "ratios": ratios, "versions": versions}, indent=2) + "\n"
        write_file(path, lambda path: path.write_text(text))
