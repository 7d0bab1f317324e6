"""Pages that are made from rows: every kind of comment against figures worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import compare, main, refreshed, table, write_page

ROWS = [
    {"run": "a-1", "arm": "a", "seed": 1, "kl": 1.0, "size": 2e6, "machine": {"device": "x", "cpus": "2"}},
    {"run": "a-2", "arm": "a", "seed": 2, "kl": 3.0, "size": 2e6, "machine": {"device": "x", "cpus": "2"}},
    {"run": "b-1", "arm": "b", "seed": 1, "kl": 0.5, "note": "plain", "machine": {"device": "y", "cpus": "2"}},
    {"run": "b-2", "arm": "b", "seed": 2, "kl": 0.5, "note": "plain", "machine": {"device": "y", "cpus": "2"}},
]
SHOW = {"KL": "{kl:.1f}", "mean": "{mean_kl:.2f}", "MB": "{size:1e-6*.1f}", "note": "{note} ({kl:.0f})"}


def test_a_table_has_mean_and_deviation_of_each_group() -> None:
    assert table(ROWS, {"": "arm"}, SHOW).splitlines() == [
        "|  | KL | mean | MB | note |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| a | 2.0 ± 1.4 | 2.00 | 2.0 | - |",
        "| b | 0.5 | 0.50 | - | plain (0) |",
    ]


def test_tables_are_sorted_and_made_for_each_value() -> None:
    lines = table(ROWS, {"": "arm"}, {"KL": "{kl:.1f}"}, sort=["kl"]).splitlines()
    assert [line[2] for line in lines[2:]] == ["b", "a"]
    assert [line[2] for line in table(ROWS, {"": "arm"}, {}, sort=["-kl"]).splitlines()[2:]] == ["a", "b"]
    parts = table(ROWS, {"run": "run"}, {"KL": "{kl:.1f}"}, each="arm", title="### {arm}: {mean_kl:.1f}").split("\n\n")
    assert parts[0] == "### a: 2.0" and parts[2] == "### b: 0.5" and "| b-2 | 0.5 |" in parts[3]


def test_points_of_a_row_are_rows() -> None:
    row = {"run": "graphs", "graphs": [{"format": "int8", "size": 1}, {"format": "fp8", "size": 2}]}
    assert table([row], {"format": "format"}, {"size": "{size:.0f}"}, points="graphs").endswith(
        "| int8 | 1 |\n| fp8 | 2 |\n"
    )


@pytest.mark.parametrize(
    ("ours", "more", "shown", "side"),
    [
        # differences 0.4, 0.4, 0.39: deviation 0.00577, half-width 4.30 * that / sqrt(3)
        ([0.5, 0.6, 0.7], {}, "+0.397 (+0.382 to +0.411)", "higher"),
        ([0.5, 0.6, 0.7], {"scale": -100}, "-39.67 (-41.10 to -38.23)", "lower"),
        ([0.9, 0.1, 0.2], {}, None, "open"),
        ([0.05, 0.1, 0.155], {"times": 0.5}, "+0.000 (+0.000 to +0.000)", "open"),
        ([0.5], {}, "+0.400 (+0.400 to +0.400)", "open"),
    ],
)
def test_differences_are_taken_seed_by_seed(
    ours: list[float], more: dict[str, Any], shown: str | None, side: str
) -> None:
    rows = [{"arm": "ours", "seed": seed, "kl": value} for seed, value in enumerate(ours)]
    rows += [{"arm": "theirs", "seed": seed, "kl": value} for seed, value in enumerate([0.1, 0.2, 0.31])]
    pair = {
        "title": "x",
        "of": "kl",
        "ours": {"arm": "ours"},
        "theirs": {"arm": "theirs"},
        "expected": "higher",
        **more,
    }
    line = compare(rows, [pair]).splitlines()[-1]
    assert line.startswith("| x | higher | ") and line.endswith(f" | {side} |")
    assert shown is None or f" {shown} " in line


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    text = """# Title

<!-- table
rows: rows.jsonl
where: {arm: [b, a], seed: 1}
by: {student: arm}
show: {KL: "{kl:.1f}"}
-->
stale
<!-- end -->

Words.

<!-- machines
rows: rows.jsonl
-->
<!-- end -->

<!-- dots
rows: rows.jsonl
file: pictures/dots.png
title: Dots
by: arm
series: seed
show: {KL: kl}
-->
<!-- end -->

<!-- lines
rows: rows.jsonl
file: pictures/lines.png
title: Lines
by: arm
x: {seed: seed}
y: {KL: kl}
-->
<!-- end -->
"""
    path = tmp_path / "page.md"
    path.write_text(text)
    return path


def test_a_page_keeps_its_words_and_gets_its_tables_and_pictures(page: Path) -> None:
    write_page(page)
    text = page.read_text()
    assert "stale" not in text and text.startswith("# Title\n") and "Words." in text
    assert "-->\n\n| student | KL |\n| --- | ---: |\n| b | 0.5 |\n| a | 1.0 |\n\n<!-- end -->" in text
    assert "- device x, cpus 2.\n- device y, cpus 2.\n" in text
    for name in ("dots", "lines"):
        assert f"\n![{name.capitalize()}](pictures/{name}.png)\n" in text
        assert (page.parent / f"pictures/{name}.png").stat().st_size > 1000
    assert refreshed(page) == text


def test_a_stale_page_is_found_and_left_alone(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = page.read_text()
    assert main([str(page), "--check"]) == 2
    assert "expected tables as the rows give them, found others in page.md" in capsys.readouterr().err
    assert page.read_text() == before and not (page.parent / "pictures").exists()
    assert main([str(page)]) == 0
    assert main([str(page), "--check"]) == 0


def test_what_no_comment_can_say_is_one_sentence(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.write_text("<!-- pie\nrows: rows.jsonl\n-->\n<!-- end -->\n")
    assert main([str(page)]) == 2
    assert "expected a comment of table, compare, machines, dots, lines in" in capsys.readouterr().err
    page.write_text("<!-- table\nrows: none.jsonl\n-->\n<!-- end -->\n")
    assert main([str(page)]) == 2
    assert "none.jsonl" in capsys.readouterr().err
