"""Processes that take steps when told: so two real training loops can be measured in turns, each with memory of its own.

A worker is a function `side(gate, **settings)` that trains and calls `gate.arrive(...)` at the start of every step.  The gate
reports the step that has just ended and waits until the parent grants the next one, so whatever a trainer does between two
gates (data, logging, schedules) belongs to a step, and only one worker runs at a time.

The lines on the pipes are JSON: the parent sends `{}` for each step, the worker answers `{"seconds", "cpu_seconds",
"peak_bytes", ...}`.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
WARM_UP = 3  # steps; both sides' memory grows over the first few, and fresh pages cost more than what is done on them


class Worker:
    """A child process that runs `side(gate, **settings)`, until `close`; the side is `module:name`, the settings plain data."""

    def __init__(self, side: str, settings: Mapping[str, Any]) -> None:
        self.side = side
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the worker)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", side, json.dumps(dict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
        )

    def step(self) -> dict[str, Any]:
        """Let it take one step; what the worker reports of it.

        Raises:
            RuntimeError: The worker ended instead; the message holds the end of what it wrote to stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: the empty answer says so
            print("{}", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(
                f"expected the worker {self.side} to answer, found that it ended with code {code}; its last lines were: "
                f"{self._errors.read()[-2000:]}"
            )
        row: dict[str, Any] = json.loads(answer)
        return row

    def close(self) -> None:
        """End it: it stands at its gate and has nothing to finish."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


class Gate:
    """A worker's end of the pipes; takes standard output for itself and leaves standard error to the libraries."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._started: tuple[float, float] | None = None

    def arrive(self, **figures: Any) -> None:
        """Report the step that has just ended, if there was one, with its figures; return when the next may start."""
        if self._started is not None:
            wall, cpu = (now - then for now, then in zip(clocks(), self._started, strict=True))
            row = {"seconds": wall, "cpu_seconds": cpu, "peak_bytes": peak_bytes(), **figures}
            print(json.dumps(row), file=self._answers, flush=True)
        if not sys.stdin.readline():
            sys.exit()
        if self._started is not None:  # the first step warms up, so loading counts in no other step's peak
            reset_peak()
        self._started = clocks()


def take_turns(
    workers: Mapping[str, Worker], *, repetitions: int, warm_up: int = WARM_UP
) -> dict[str, list[dict[str, Any]]]:
    """The rows of every worker's counted steps, behind some that are not counted; the workers are closed at the end."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    try:
        for _ in tqdm(range(warm_up + repetitions), desc=" / ".join(workers), unit="round", leave=False):
            for name, worker in workers.items():
                rows[name].append(worker.step())
    finally:
        for worker in workers.values():
            worker.close()
    return {name: found[warm_up:] for name, found in rows.items()}


def peak_bytes() -> int:
    """Peak memory since `reset_peak`: what torch allocated on a GPU, else the resident set of the whole process (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM")


def resident_bytes(field: str) -> int:
    """The resident set of this process now (`VmRSS`) or at its peak (`VmHWM`), on Linux."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    """Forget the peak so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def clocks() -> tuple[float, float]:
    """Seconds of the wall clock and of this process's threads on the CPU, which a busy machine changes less, all work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def main() -> None:
    """The child process: `python -m benchmarks.workers MODULE:NAME SETTINGS`."""
    gate = Gate()
    module, _, name = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), name)(gate, **json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
