"""The Python of the README and of `docs/library.md`, as it stands there but for the model's name and size."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_folder, tiny_jsonl


@pytest.mark.recipe
@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_a_model_is_cut_quantized_and_exported(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny_folder(Path("my-model"), head_dim=16)
    tiny_jsonl(Path("my.jsonl"), [(f"{n} plus {n}?", str(2 * n)) for n in range(8)])
    found: dict[str, Any] = {}
    exec(code.replace("neurons=1024", "neurons=16"), found)
    assert {check["status"] for check in found["report"]["verification"]} == {"passed"}
    config = json.loads(Path("small/student/config.json").read_text())
    assert config["intermediate_size"] == 16 and Path("small/onnx/cpu.onnx").is_file()
