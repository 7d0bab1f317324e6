"""What mkdocs has to be told: README, CONTRIBUTING and CHANGELOG lie beside docs/, and are pages, too."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
NAMES = ("README", "CONTRIBUTING", "CHANGELOG")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the three as `project/readme.md` and so on, with links as seen from there."""
    for name in NAMES:
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("](docs/", "](../")
        files.append(File.generated(config, f"project/{name.lower()}.md", content=_lowered(text, "")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to the three lead to these pages."""
    return _lowered(markdown, "../", "project/")


def _lowered(text: str, before: str, place: str = "") -> str:
    return re.sub(
        rf"\]\({re.escape(before)}({'|'.join(NAMES)})\.md", lambda link: f"]({place}{link[1].lower()}.md", text
    )
