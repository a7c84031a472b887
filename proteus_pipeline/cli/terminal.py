"""Colours, where the terminal takes them."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing takes 5 ms to import, a tenth of what a quick command may take
if TYPE_CHECKING:
    from typing import TextIO

_CODES = {"red": "31", "green": "32", "yellow": "33"}


def painted(text: str, colour: str, stream: TextIO | None = None) -> str:
    """Return a text in colour, where `stream` (stdout by default) is a terminal that takes it.

    NO_COLOR (https://no-color.org) and TERM=dumb say no; a pipe or a file gets plain text.
    """
    stream = stream or sys.stdout
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\x1b[{_CODES[colour]}m{text}\x1b[0m"
