"""Every benchmark says what it does, and what it takes, when asked."""

import pkgutil
import sys
from importlib import import_module

import pytest

import benchmarks

COMMANDS = [
    module.name
    for module in pkgutil.iter_modules(benchmarks.__path__)
    if hasattr(import_module(f"benchmarks.{module.name}"), "main") and module.name not in ("workers", "chats")
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        import_module(f"benchmarks.{name}").main()
    assert stop.value.code == 0
    if name != "quickstart":  # which copies what a run has written as JSON
        assert "--json" in capsys.readouterr().out
