"""The blocks of a study's page in docs/results, to be made from the rows of a short run."""

from pathlib import Path

from benchmarks.page import BLOCK
from tests.helpers.short_runs import ROOT


def page_beside(out: Path, page: str, rows: str) -> Path:
    """Write `<out>.md` with those blocks of a page that show some rows, in the place of which those of `out` stand; returns the path."""
    text = (ROOT / f"docs/results/{page}.md").read_text(encoding="utf-8")
    blocks = [found[0] for found in BLOCK.finditer(text) if f"rows: {rows}.jsonl\n" in found[3]]
    assert blocks
    whole = "\n".join(blocks).replace(f"rows: {rows}.jsonl", f"rows: {out.name}.jsonl")
    target = out.with_suffix(".md")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(whole.replace(f"file: {page}/", f"file: {out.name}/"), encoding="utf-8")
    return target
