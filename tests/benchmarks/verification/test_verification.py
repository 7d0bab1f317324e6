"""The benchmark of verification on tiny models: what it counts, and that a miss and a false alarm would be seen."""

import json
import random
import sys
from pathlib import Path

import pytest

from benchmarks.verification import __main__ as verification
from benchmarks.verification.__main__ import Examined, false_alarms
from benchmarks.verification.faults import PLANTED
from benchmarks.verification.graphs import drawn, random_texts, right_graphs, tiny
from export.verify import exactness

pytestmark = pytest.mark.long

KEPT = ("padding seen", "cosines of the next position", "a cache's scale off by 5 %", "the last position but one")


@pytest.fixture(scope="module")
def texts():
    return random_texts()


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, texts):
    return right_graphs(tiny("llama"), texts[0], tmp_path_factory.mktemp("graphs"), ("fp16", "int8"), "tiny")


def test_the_command_writes_what_scripts_read(graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification.right, "right_graphs", lambda *_: graphs)
    monkeypatch.setattr(verification, "PLANTED", {name: PLANTED[name] for name in KEPT})
    target = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["verification", "--quick", "--repetitions", "4", "--json", str(target)])
    verification.main()
    written = json.loads(target.read_text())
    assert written["ratios"] == {"false_alarms": 0.0, "undecided": 0.0, "caught": 1.0}
    right = [row for row in written["results"] if row["what"] == "right"]
    assert sum(row["verifications"] for row in right) == 4
    assert all(0 < row["ratio_median"] <= row["ratio_max"] < exactness.LIMIT / 2 for row in right)
    found = {(row["name"], row["graph"]) for row in written["results"] if row["what"] == "fault"}
    assert found == {(name, graph) for name in KEPT for graph in PLANTED[name][1] if graph != "gemma3_text"}


def test_a_right_graph_that_fails_is_a_false_alarm(graphs, texts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "LIMIT", 1e-6)
    (row,) = false_alarms(graphs[:1], texts[1], 2, free=False)
    assert row["verifications"] == row["false_alarms"] == 2
    assert row["failures"][0].startswith("fp16, prefill: ")


def test_free_runs_are_judged(graphs, texts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "ASKED", 2)
    (row,) = false_alarms(graphs[:1], texts[1], 4, free=True)  # every third verification has one
    assert row["free_runs"] == 2 and row["false_alarms"] == 0 and row["half_interval"] > 0


def test_what_is_no_fault_is_not_caught(graphs, texts) -> None:
    drawn_texts = drawn(texts[1], random.Random(0), 2, padded=True)
    row = Examined(graphs[0], drawn_texts).row("nothing", lambda model: None)
    assert row["caught"] is False
    with pytest.raises(LookupError, match="this fault is none in this graph"):
        Examined(graphs[0], drawn_texts).row("scale", PLANTED["an input's scale off by 5 %"][0])
