"""What the planner's benchmark prints: every recipe's ratio, and the worst of them, within the bounds that the pages promise."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import planner


@pytest.mark.long
@pytest.mark.real
def test_a_prediction_meets_what_a_run_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["planner", "sft", "lora", "--json", str(tmp_path / "found.json")])
    planner.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["ratios"]) == {"worst", "sft", "lora"}
    assert found["ratios"]["worst"] in (found["ratios"]["sft"], found["ratios"]["lora"])
    assert 0.9 < found["ratios"]["worst"] < 1.15
    assert "predicted" in capsys.readouterr().out
