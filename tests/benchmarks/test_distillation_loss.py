import json
import sys
from pathlib import Path

import pytest

from benchmarks import distillation_loss

pytestmark = pytest.mark.long


def test_the_benchmark_writes_what_scripts_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.json"
    sizes = ["512x4096x16"]
    arguments = ["--sizes", *sizes, "--objective", "jsd", "--chunk-tokens", "32", "--repetitions", "1"]
    monkeypatch.setattr(sys, "argv", ["distillation_loss", *arguments, "--json", str(target)])
    distillation_loss.main()
    written = json.loads(target.read_text())
    rows = {(row["name"], row["size"]): row for row in written["results"]}
    assert set(rows) == {(name, size) for name in ("potstill", "naive") for size in sizes}
    for key, ratio in (("peak_extra_mib", "peak_extra_memory"), ("median_s", "time")):
        quotients = [rows["potstill", size][key] / rows["naive", size][key] for size in sizes]
        assert written["ratios"][ratio] == pytest.approx(max(quotients))
    for size in sizes:  # a naive JSD holds at least five such tensors at once
        assert rows["naive", size]["peak_extra_mib"] > 5 * 2**21 * 4 / 2**20
        assert rows["potstill", size]["peak_extra_mib"] < rows["naive", size]["peak_extra_mib"] / 2
