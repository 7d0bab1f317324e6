import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kills
from tests.helpers.short_runs import ROOT


def test_a_difference_is_found_wherever_it_is() -> None:
    whole = {
        "state_dict": {"a": torch.ones(2)},
        "edits": [1, 2],
        "metrics": {("3", "val/kl"): "0.1", ("6", "val/kl"): "0.2"},
    }
    chain = {"state_dict": {"a": torch.ones(2)}, "edits": [1, 2], "metrics": {("6", "val/kl"): "0.2"}}
    assert kills._difference(chain, whole) is None
    assert kills._difference(chain | {"state_dict": {"a": torch.tensor([1.0, 2.0])}}, whole) == ".state_dict.a"
    assert kills._difference(chain | {"edits": [1]}, whole) == ".edits (length)"
    assert kills._difference(chain | {"metrics": {("6", "val/kl"): "0.3"}}, whole) == ".metrics.('6', 'val/kl')"
    assert kills._difference(chain | {"metrics": {("7", "val/kl"): "0.3"}}, whole) is not None


@pytest.mark.long
def test_runs_that_are_killed_end_as_the_one_that_was_not(tmp_path: Path) -> None:
    """In a process of its own: it forks, which one that has used threads must not."""
    target = tmp_path / "kills.json"
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "8", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    assert found["ratios"] == {"lost": 0, "different": 0}
    assert sum(row["kills"] for row in found["results"]) == 8
