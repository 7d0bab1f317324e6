"""Size and speed of a format's graph on this machine's CPU: part of the quantization study.

Weights are rounded to nearest, as size and speed do not depend on how they are rounded.  FP8 has a size only: CPUs have no products for it.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import interleave, spread
from benchmarks.onnx_decode import NEW, decoding, prefilling
from benchmarks.quantization.arms import Arm
from export.cpu_graph.to_cpu import write_cpu_graph
from export.layout import CPU
from export.onnx_graph.to_onnx import export_onnx
from program.files import folder_bytes

PLAIN = "fp32"
THREADS = 2
PIECE = 128


def graph_rows(bench: Any, formats: Sequence[str], repetitions: int) -> list[dict[str, Any]]:
    """Figures of the unquantized graph and of every format's, timed in turns.

    Args:
        bench: A `benchmarks.quantization.__main__.Bench`.
        formats: Of all projections; the head has 8 bits.
        repetitions: Of every timing.

    Returns:
        Rows of `format`, `megabytes`, and but for FP8 `tokens_per_second` (behind 128 tokens), `first_token_ms` (512 tokens) and the
        spread of both, the longest time over the shortest.
    """
    with tempfile.TemporaryDirectory() as temporary:
        names = tqdm((PLAIN, *formats), desc="Graphs", unit="format", leave=False)
        paths = {name: _write(bench, name, Path(temporary) / name) for name in names}
        runnable = {name: path for name, path in paths.items() if path.name == CPU}
        decode = _timed({name: decoding(path, THREADS) for name, path in runnable.items()}, repetitions)
        prefill = _timed({name: prefilling(path, THREADS, piece=PIECE) for name, path in runnable.items()}, repetitions)
        return [
            {"format": name, "megabytes": _megabytes(path)}
            | (_figures(decode[name], prefill[name]) if name in runnable else {})
            for name, path in paths.items()
        ]


def _write(bench: Any, name: str, folder: Path) -> Path:
    model = bench.model if name == PLAIN else bench.quantized(Arm(name))
    graph = export_onnx(model, folder / "model.onnx", precision=name)  # type: ignore[arg-type]  # names of formats are precisions
    if name.startswith("fp8"):
        return graph.path
    path = write_cpu_graph(graph.path)
    graph.path.unlink()
    graph.data_path.unlink()
    return path


def _timed(sides: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, dict[str, float]]:
    return {name: spread(seconds) for name, seconds in interleave(sides, repetitions=repetitions).items()}


def _figures(decode: dict[str, float], prefill: dict[str, float]) -> dict[str, Any]:
    return {
        "tokens_per_second": NEW / decode["median_s"],
        "decode_spread": decode["max_s"] / decode["min_s"],
        "first_token_ms": 1000 * prefill["median_s"],
        "prefill_spread": prefill["max_s"] / prefill["min_s"],
    }


def _megabytes(path: Path) -> float:
    return (folder_bytes(path) + folder_bytes(path.with_name(path.name + ".data"))) / 1e6
