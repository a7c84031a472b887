"""What a command says besides its result and its errors; --quiet leaves it out."""

from __future__ import annotations

import os
import sys

# Set by --quiet, for this process and those that DVC starts for the stages.
QUIET = "PROTEUS_QUIET"


def quiet() -> bool:
    """Say whether progress and notes are to be left out."""
    return bool(os.environ.get(QUIET))


def note(text: str) -> None:
    """Tell the user something on stderr, that is no result and no error."""
    if not quiet():
        print(f"note: {text}", file=sys.stderr)
