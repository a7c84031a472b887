"""The documents that people read, taken apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

RUN = {"sh", "python"}
SHOWN = {"text", "console", "yaml", "json", "ini", "promql", '{.python title="examples/serve.py"}'}
"""What stands in a block and is not run: output, what needs a cluster or another machine, a file that has tests of its own."""
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    text: str


def documents() -> list[Path]:
    """README, and all pages of the site that are files."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path) -> list[Block]:
    return [Block(language, text) for _, language, text in _FENCE.findall(document.read_text())]


def outside_blocks(document: Path) -> str:
    return _FENCE.sub("", document.read_text())


def called(document: Path) -> str:
    return str(document.relative_to(ROOT))
