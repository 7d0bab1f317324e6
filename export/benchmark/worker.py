"""An artefact in a process of its own, so that its peak memory is its own; it measures one cell when asked to.

The lines on the pipes are JSON: the parent sends a cell, the child answers `first_seconds`, `decode_seconds`, `peak_bytes`,
`device_bytes` and `joules`, or `error`.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from export.benchmark.artefacts import Artefact, open_session
from export.benchmark.energy import Meter, find_counters
from export.benchmark.measure import Cell, measure

ROOT = Path(__file__).parents[2]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Answer = dict[str, Any]


class Worker:
    """The child process, seen from the parent; a context that ends it.  Arguments as for `open_session`."""

    def __init__(self, artefact: Artefact, threads: int | None, length: int) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the worker)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "export.benchmark.worker",
                json.dumps({**asdict(artefact), "threads": threads, "length": length}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def measure(self, cell: Cell) -> Answer:
        """What the child answers; `error` also if it has ended, for example for lack of memory."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the empty answer says so
            print(json.dumps(asdict(cell)), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if line:
            answer: Answer = json.loads(line)
            return answer
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:] or ["no message"]
        return {"error": f"the process ended with code {code} ({last[0]})"}


def main() -> None:
    """The child: `python -m export.benchmark.worker SPECIFICATION`."""
    specification = json.loads(sys.argv[1])
    threads, length = specification.pop("threads"), specification.pop("length")
    artefact = Artefact(**specification)
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not look like an answer
        free = _free_device_bytes(artefact)
        session = open_session(artefact, threads, length)
        meter = Meter(find_counters()[0])
        for line in sys.stdin:
            print(
                json.dumps(_answer(session, artefact, Cell(**json.loads(line)), meter, free)), file=answers, flush=True
            )


def _answer(session: Any, artefact: Artefact, cell: Cell, meter: Meter, free: int) -> Answer:
    _forget_peak(artefact)
    meter.joules()
    try:
        first, decode = measure(session, cell)
    except (ValueError, IndexError, RuntimeError) as error:  # sizes that an engine or a model does not take
        return {"error": str(error).strip().splitlines()[0]}
    return {
        "first_seconds": first,
        "decode_seconds": decode,
        "joules": meter.joules(),
        "peak_bytes": peak_bytes(),
        "device_bytes": free - _free_device_bytes(artefact) if artefact.device == "cuda" else None,
    }


def _free_device_bytes(artefact: Artefact) -> int:
    """What is free on the whole GPU: torch's allocator and TensorRT keep what they once took, so this shows their peak."""
    return torch.cuda.mem_get_info()[0] if artefact.device == "cuda" else 0


def _forget_peak(artefact: Artefact) -> None:
    if artefact.device == "cuda":
        torch.cuda.empty_cache()
    if CLEAR.exists():
        CLEAR.write_text("5")


def peak_bytes() -> int | None:
    """Largest resident set of this process since `_forget_peak`; None on systems without /proc."""
    if not STATUS.exists():
        return None
    return 1024 * int(next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main()
