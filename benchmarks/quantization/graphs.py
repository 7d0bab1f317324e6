"""Size and speed of a format's graph on this machine's CPU: part of the quantization study.

Weights are rounded to nearest, as size and speed do not depend on how they are rounded.  FP8 has a size only: CPUs have no products for it.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.harness import interleave
from benchmarks.onnx_decode import NEW, decoding, prefilling
from benchmarks.onnx_graphs import cpu_graph_alone
from benchmarks.quantization.arms import Arm
from export.layout import CPU
from export.onnx_graph.to_onnx import export_onnx
from program.files import folder_bytes

PLAIN = "fp32"
THREADS = 2
PIECE = 128


def graph_rows(bench: Any, formats: Sequence[str], repetitions: int) -> list[dict[str, Any]]:
    """Rows of the unquantized graph and of every format's, timed in turns: `format`, `megabytes`, and but for FP8 `tokens_per_second`
    (behind 128 tokens), `first_token_ms` (512 tokens) and the spread of both, the longest time over the shortest.
    """
    with tempfile.TemporaryDirectory() as temporary:
        names = tqdm((PLAIN, *formats), desc="Graphs", unit="format", leave=False)
        paths = {name: _write(bench, name, Path(temporary) / name) for name in names}
        timed = {name: path for name, path in paths.items() if path.name == CPU}
        decode = interleave({name: decoding(path, THREADS) for name, path in timed.items()}, repetitions=repetitions)
        prompts = {name: prefilling(path, THREADS, piece=PIECE) for name, path in timed.items()}
        prefill = interleave(prompts, repetitions=repetitions)
        rows: list[dict[str, Any]] = []
        for name, path in paths.items():
            size = folder_bytes(path) + folder_bytes(path.with_name(path.name + ".data"))
            rows.append({"format": name, "megabytes": size / 1e6})
            if name in timed:
                rows[-1]["tokens_per_second"] = NEW / median(decode[name])
                rows[-1]["decode_spread"] = max(decode[name]) / min(decode[name])
                rows[-1]["first_token_ms"] = 1000 * median(prefill[name])
                rows[-1]["prefill_spread"] = max(prefill[name]) / min(prefill[name])
        return rows


def _write(bench: Any, name: str, folder: Path) -> Path:
    model = bench.model if name == PLAIN else bench.quantized(Arm(name))
    graph = export_onnx(model, folder / "model.onnx", precision=name)  # type: ignore[arg-type]  # names of formats are precisions
    return graph.path if name.startswith("fp8") else cpu_graph_alone(graph)
