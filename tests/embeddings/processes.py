"""Other processes, for tests of what several do to one cache at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def script(code: str, *args: object, through: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start Python on some code, with this folder's modules; `through` is put before it, as `unshare` would be."""
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent), str(FOLDER.parent / "models"), str(FOLDER.parent.parent)])
    return subprocess.Popen(
        [*through, sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def ends_well(process: subprocess.Popen[str], timeout: float = 60) -> str:
    """Return what it printed."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out
