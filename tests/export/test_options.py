"""Options that do not belong together are refused before the model is loaded; those that do give layers their formats."""

import re
from pathlib import Path

import pytest

from export.__main__ import main
from export.options import calibration_of, parser

HERE = ["nowhere", "--output", "out"]
CALIBRATED = ["--calibration", "mine.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq"], "expected --calibration FILE.jsonl beside --method, found none"),
        (["--precision", "mixed", "--average-bits", "5"], "expected --calibration FILE.jsonl beside --average-bits"),
        (CALIBRATED, "expected a quantized precision with --calibration, found fp32"),
        ([*CALIBRATED, "--precision", "fp16"], "expected a quantized precision with --calibration, found fp16"),
        ([*CALIBRATED, "--precision", "mixed"], "one of --layer-formats and --average-bits, .* mixed and neither"),
        (
            [*CALIBRATED, "--precision", "mixed", "--average-bits", "5", "--layer-formats", "*=int8"],
            "mixed and --layer-formats and --average-bits",
        ),
        ([*CALIBRATED, "--precision", "int8", "--average-bits", "5"], "found precision int8 and --average-bits"),
        (["--precision", "int8"], "calibrated or no input scales for a float16 graph or an engine, found int8"),
        (["--precision", "int4_g32_zp"], "expected a symmetric format for an engine, found int4_g32_zp"),
        (["--precision", "fp8", "--compute-capability", "8.6"], "at least 8.9 for an FP8 engine, found 8.6"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*HERE, *options]) == 2
    printed = capsys.readouterr()
    assert "Loading" not in printed.out
    assert re.search(message, printed.err), printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["int8", "=int8", "*.down_proj=int9"])
def test_layers_and_formats_are_pairs(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([*HERE, "--layer-formats", text])
    assert "expected PATTERN=FORMAT such as *.down_proj=int8_g64" in capsys.readouterr().err


def test_what_the_options_ask_for() -> None:
    plain = calibration_of(parser().parse_args([*HERE, *CALIBRATED, "--precision", "fp8"]))
    assert plain is not None
    assert (plain.formats, plain.settings.method, plain.num_conversations) == ({"*": "fp8_e4m3"}, "quantease", 128)
    words = ["--precision", "mixed", "--layer-formats", "*=int4_g64", "*.0.*=none", "--method", "gptq"]
    mixed = calibration_of(parser().parse_args([*HERE, *CALIBRATED, *words, "--calibration-conversations", "7"]))
    assert mixed is not None
    assert (mixed.formats, mixed.average_bits) == ({"*": "int4_g64", "*.0.*": "none"}, None)
    assert (mixed.settings.method, mixed.num_conversations) == ("gptq", 7)
    assert mixed.of_the_model and mixed.cpu_format is None
    for words, too in (([], False), (["--kv-cache", "int8"], True), (["--precision", "int8"], True)):
        both = calibration_of(parser().parse_args([*HERE, *CALIBRATED, "--cpu", "int8", *words]))
        assert both is not None and (both.cpu_format, both.of_the_model) == ("int8", too)
    words = ["--precision", "mixed", "--average-bits", "5"]
    both = calibration_of(parser().parse_args([*HERE, *CALIBRATED, "--cpu", "int8", *words]))
    assert both is not None and both.of_the_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "-1"], "expected threads between 1 and 1,024, found -1; change it"),
        (["--threads", "100000"], "expected threads between 1 and 1,024, found 100,000"),
        (["--decode-steps", "-1"], "expected decode_steps between 0 and 1,000,000, found -1"),
        (["--decode-steps", "1000000000"], "expected decode_steps between 0 and 1,000,000, found 1,000,000,000"),
        (["--benchmark-prompt", "0"], "expected benchmark_prompt between 1 and"),
        (["--benchmark-repetitions", "-1"], "expected benchmark_repetitions between 0 and"),
    ],
)
def test_numbers_out_of_their_range(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*HERE, *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    """Not fifty lines of usage above it."""
    for arguments in (["--opset", "7", *HERE], [*HERE, "--nonsense"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and line.endswith("(all options: python -m export --help)")
