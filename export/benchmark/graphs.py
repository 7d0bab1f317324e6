"""The short benchmark at the end of an export: its graphs, in turns, with one conversation on the CPU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.benchmark.artefacts import Artefact
from export.benchmark.measure import Cell
from export.benchmark.turns import compare

_NEW_TOKENS = 16


@dataclass(frozen=True)
class ShortBenchmark:
    """What is measured: a prompt of so many tokens, after one repetition that is not counted.

    Each graph runs in a process of its own, as it is served: what training left behind in this one (threads, memory in
    small pieces) made `cpu.onnx` of SmolLM2-135M take twice as long to a first token, and three times for the others.
    """

    prompt_tokens: int
    repetitions: int
    threads: int | None

    def measure(self, paths: Mapping[str, Path], on_step: Callable[[], None]) -> list[dict[str, Any]]:
        """One row a graph: sizes in bytes, times in milliseconds, speeds in tokens/s; or a `reason` why not."""
        artefacts = [Artefact(name, "onnx", "cpu", str(path.absolute())) for name, path in paths.items()]
        cell = Cell(1, self.prompt_tokens, _NEW_TOKENS)
        settings = {"threads": self.threads, "new_tokens": _NEW_TOKENS, "repetitions": self.repetitions}
        rows = compare(artefacts, [cell], repetitions=self.repetitions, threads=self.threads, on_step=on_step)
        return [
            {"path": paths[artefact.name].as_posix(), "bytes": artefact.bytes, **settings, **row}
            for artefact, row in zip(artefacts, rows, strict=True)
        ]
