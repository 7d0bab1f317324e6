"""Every benchmark says what it does, and what it takes, when asked."""

import pkgutil
import sys
from importlib import import_module

import pytest

import benchmarks

COMMANDS = [
    module.name.removeprefix("benchmarks.")
    for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    if hasattr(import_module(module.name), "main") and module.name not in ("benchmarks.workers", "benchmarks.chats")
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        import_module(f"benchmarks.{name}").main()
    assert stop.value.code == 0
    if name not in ("quickstart", "page"):  # which show what a run or a study has written as JSON
        assert "--json" in capsys.readouterr().out
