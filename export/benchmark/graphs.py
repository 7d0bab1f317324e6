"""The short benchmark at the end of an export: its graphs, in turns, with one conversation on the CPU."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from export.benchmark.artefacts import Artefact
from export.benchmark.measure import Cell
from export.benchmark.turns import compare


def benchmark_onnx(
    paths: Mapping[str, Path],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    repetitions: int = 5,
    threads: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Measure graphs in turns with one conversation on the CPU, after one repetition that is not counted.

    Each runs in a process of its own, as it is served: what training left behind in this one (threads, memory in small pieces) made
    `cpu.onnx` of SmolLM2-135M take twice as long to a first token, and three times as long for the others.

    Args:
        paths: Graphs written by `export_onnx`, by the name that a row shall carry.
        prompt_tokens: Length of the prompt, tokens.
        new_tokens: Tokens decoded after the first one.
        repetitions: Counted repetitions.
        threads: Threads of one operator; None: ONNX Runtime's choice.
        on_step: Called after each measurement of one graph.

    Returns:
        One row a graph: sizes in bytes, times in milliseconds, speeds in tokens/s; or a `reason` why it could not be measured.
    """
    artefacts = [Artefact(name, "onnx", "cpu", str(path.absolute())) for name, path in paths.items()]
    cell = Cell(1, prompt_tokens, new_tokens)
    settings = {"threads": threads, "new_tokens": new_tokens, "repetitions": repetitions}
    rows = compare(artefacts, [cell], repetitions=repetitions, threads=threads, on_step=on_step)
    return [
        {"path": paths[artefact.name].as_posix(), "bytes": artefact.bytes, **settings, **row}
        for artefact, row in zip(artefacts, rows, strict=True)
    ]
