"""The documents that people read, taken apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

RUN = {"sh", "python"}
PRINTS = 'text title="prints"'
"""What the commands above the block print, or the parts of it that are worth a reader's time."""
SHOWN = {"text", "console", "bash", "yaml", "json", "ini", "promql", '{.python title="examples/serve.py"}'}
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


def told(text: str) -> str:
    """Return a line with nothing left of its numbers but whether they are 0, and of its spaces that they are there.

    A document has a whole data set's numbers, and its test embeds less. A version's number stays as it is.
    """

    def number(found: re.Match[str]) -> str:
        version = found[0].count(".") == 2
        return found[0] if version else "N" if found[0].strip("0.,") else "0"

    return " ".join(re.sub(r"\d+(?:[.,]\d+)*", number, text).split())


def called(document: Path) -> str:
    return str(document.relative_to(ROOT))
