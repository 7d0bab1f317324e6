"""Programs that start a second process themselves: two ranks on the CPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.short_runs import ROOT


def start(arguments: Sequence[str], place: Path) -> subprocess.Popen:
    """A script that starts a second process itself, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait(process: subprocess.Popen, seconds: float = 240) -> str:
    """What both processes printed until they ended.  Nothing of them outlives the time limit."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"the ranks hang:\n{output[-5000:]}")
    return output


def ended_well(process: subprocess.Popen) -> str:
    """What both processes printed until they ended well."""
    output = wait(process)
    assert process.returncode == 0, output[-5000:]
    return output


def run(arguments: Sequence[str], place: Path) -> str:
    """Run a script to its end; what it printed."""
    return ended_well(start(arguments, place))
