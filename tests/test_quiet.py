"""A program begins with its own words."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_library_speaks_first() -> None:
    command = [sys.executable, "-m", "export", "--help"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.startswith("usage: python -m export")
