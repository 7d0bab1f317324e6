"""Artefacts measured in turns: in every repetition each gets its turn at each cell, so a change of the load meets all of them."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from export.benchmark.artefacts import Artefact
from export.benchmark.measure import Cell, spread
from export.benchmark.worker import Answer, Worker
from models.hardware.interleave import PAUSE

_MS = 1000


def cells(prompts: Sequence[int], batches: Sequence[int], new_tokens: int) -> list[Cell]:
    """Every prompt length with the smallest batch, and every batch with the shortest prompt."""
    lengths = [Cell(min(batches), prompt, new_tokens) for prompt in sorted(set(prompts))]
    sizes = [Cell(batch, min(prompts), new_tokens) for batch in sorted(set(batches))]
    return list(dict.fromkeys(lengths + sizes))


def compare(
    artefacts: Sequence[Artefact],
    cells: Sequence[Cell],
    *,
    repetitions: int,
    threads: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Measure every artefact at every cell, each artefact in a process of its own; all stay loaded until the end.

    One repetition before the counted ones warms up.  It goes artefact by artefact, so that what a GPU lacks after it is
    what this artefact took.  `on_step` is called `len(artefacts) * len(cells) * (repetitions + 1)` times.

    Returns:
        One row an artefact and cell: `name`, the cell's sizes, and median, smallest and largest of
        `time_to_first_token_ms`, `time_per_output_token_ms` and `tokens_per_second`; `peak_bytes` of the process (which
        keeps what the cells of the warm-up took), `device_bytes` on a GPU, `joules_per_1000_tokens` (a median); or a
        `reason` if it could not be measured.
    """
    answers: dict[tuple[Artefact, Cell], list[Answer]] = {(each, cell): [] for each in artefacts for cell in cells}

    def turn(worker: Worker, artefact: Artefact, cell: Cell) -> None:
        on_step()
        earlier = answers[artefact, cell]
        if not earlier or "error" not in earlier[-1]:  # what failed once is not tried again
            time.sleep(PAUSE)
            earlier.append(worker.measure(cell))

    length = max(cell.prompt_tokens + cell.new_tokens for cell in cells)
    with ExitStack() as stack:
        workers = {}
        for artefact in artefacts:
            workers[artefact] = stack.enter_context(Worker(artefact, threads, length))
            for cell in cells:
                turn(workers[artefact], artefact, cell)
        for _ in range(repetitions):
            for cell in cells:
                for artefact, worker in workers.items():
                    turn(worker, artefact, cell)

    def row(artefact: Artefact, cell: Cell) -> dict[str, Any]:
        sizes = {"name": artefact.name, "batch": cell.batch, "prompt_tokens": cell.prompt_tokens}
        warm_up, *counted = found = answers[artefact, cell]
        if "error" in found[-1]:
            return sizes | {"reason": found[-1]["error"]}
        return sizes | _figures(counted, cell) | {"device_bytes": warm_up["device_bytes"]}

    return [row(artefact, cell) for artefact in artefacts for cell in cells]


def _figures(answers: Sequence[Answer], cell: Cell) -> dict[str, Any]:
    decode = [answer["decode_seconds"] for answer in answers]
    peaks = [answer["peak_bytes"] for answer in answers if answer["peak_bytes"] is not None]
    joules = [answer["joules"] for answer in answers if answer["joules"] is not None]
    tokens = cell.batch * (cell.new_tokens + 1)
    energy = spread("joules_per_1000_tokens", [1000 * value / tokens for value in joules]) if joules else {}
    return {
        **spread("time_to_first_token_ms", [_MS * answer["first_seconds"] for answer in answers]),
        **spread("time_per_output_token_ms", [_MS * seconds / cell.new_tokens for seconds in decode]),
        **spread("tokens_per_second", [cell.batch * cell.new_tokens / seconds for seconds in decode]),
        "peak_bytes": max(peaks, default=None),
        "joules_per_1000_tokens": energy.get("joules_per_1000_tokens"),
    }
