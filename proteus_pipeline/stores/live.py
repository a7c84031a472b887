"""Numbers that are true as long as their process lives: a file each, which its process keeps locked.

Whoever dies, however that is, lets go of its lock: what it said counts no more, and its file goes with the next look.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = "live"
"""Where the files are, below the folder of the counts."""
# Said at one place of the file and at one length, so that who reads meanwhile finds one saying or the other.
_BYTES = 1024


class Announcement:
    """What one process says of itself in a folder. Where it can't be written, or there are no locks, nobody learns of it."""

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        with suppress(OSError):
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            path = folder / FOLDER / f"{time.time_ns():020d}-{secrets.token_hex(6)}.json"
            with _turn(folder / FOLDER):  # between these two, it would look like a dead process's
                _sweep(folder)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os.close(descriptor)
                    path.unlink(missing_ok=True)
                    raise
            self._descriptor = descriptor
            weakref.finalize(self, os.close, descriptor)

    def say(self, values: Mapping[str, float]) -> None:
        """Replace what was said before."""
        data = json.dumps(dict(values)).encode()
        if self._descriptor is not None and len(data) <= _BYTES:
            with suppress(OSError):
                os.pwrite(self._descriptor, data.ljust(_BYTES), 0)


def announced(folder: Path) -> list[dict[str, float]]:
    """Return what each process that lives says; what dead ones said is removed."""
    if not (folder / FOLDER).is_dir():
        return []
    with _turn(folder / FOLDER):
        return [said for path in sorted((folder / FOLDER).glob("*.json")) if (said := _alive(path)) is not None]


def _sweep(folder: Path) -> None:
    for path in (folder / FOLDER).glob("*.json"):
        _alive(path)


def _alive(path: Path) -> dict[str, float] | None:
    """Return what a process says; None where it is over, or says nothing yet."""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                value = json.loads(file.read(_BYTES))
                return {str(name): float(n) for name, n in value.items() if math.isfinite(float(n))}
            path.unlink(missing_ok=True)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        pass
    return None


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Let one process at a time look and begin, where there are locks."""
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
