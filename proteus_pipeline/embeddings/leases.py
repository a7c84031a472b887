"""What live runs tell each other: which segments they hold, and which embeddings they are computing.

A lease is a file that its run keeps locked, so that whoever dies lets go of everything. What a run read and wrote is not
evicted while it lives; what it is computing, others leave to it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from proteus_pipeline.stores.files import storage_error

FOLDER = "leases"
# Where a file system has no locks, a lease of a run that nobody can ask counts for so long.
_LONGEST = 7 * 86400.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """What the live runs hold together.

    Attributes
    ----------
    segments
        By name.
    since
        Everything published since then, nanoseconds since 1970, too; None where no run lives.
    runs
        How many live.

    """

    segments: frozenset[str]
    since: int | None
    runs: int = 0

    def holds(self, segment: str) -> bool:
        """Say whether a segment is held."""
        return segment in self.segments or (self.since is not None and int(segment.partition("-")[0]) >= self.since)


class Lease:
    """A run's hold on segments, and its claims to keys, as long as its process lives.

    Parameters
    ----------
    path
        Its file.
    descriptor
        The file's, locked; None where none could be written: then nobody learns of it.

    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self._path = path
        self._descriptor = descriptor
        self._since = time.time_ns()
        self._segments: set[str] = set()
        self._claims: set[str] = set()
        self._wants: set[str] = set()
        self._lock = threading.Lock()
        self._write()

    @property
    def name(self) -> str | None:
        """Its file's name, below the cache's folder; None where none could be written."""
        return f"{FOLDER}/{self._path.name}" if self._descriptor is not None else None

    def add(self, segments: Iterable[str]) -> None:
        """Hold these segments too."""
        with self._lock, _turn(self._path.parent):
            self._segments |= set(segments)
            self._write()

    def shared(self) -> bool:
        """Say whether another run lives, here or on another machine."""
        return self._descriptor is not None and any(path != self._path for path in self._path.parent.glob("*.json"))

    def claim(self, keys: Iterable[str]) -> set[str]:
        """Claim keys to compute, and return those that no older run has claimed.

        Where a file system has no locks, two runs may claim the same at the same time: each writes before it reads, so
        that both see both claims; the older run keeps them.
        """
        wanted = set(keys)
        with self._lock, _turn(self._path.parent):
            self._wants = set(wanted)
            self._write()
            for path in sorted(self._path.parent.glob("*.json")):
                said = None if path == self._path else _alive(path)
                if said:
                    wanted -= said.claims
                    wanted -= said.wants if path.name < self._path.name else set()
            self._wants = set()
            self._claims |= wanted
            self._write()
        return wanted

    def release(self, keys: Iterable[str]) -> None:
        """Let go of keys: they are published, or another run has them."""
        with self._lock, _turn(self._path.parent):
            self._claims -= set(keys)
            self._write()

    def _write(self) -> None:
        if self._descriptor is not None:
            value = {"since": self._since, "pid": os.getpid(), "segments": sorted(self._segments)}
            value |= {"claims": sorted(self._claims), "wants": sorted(self._wants)}
            with suppress(OSError):
                data = json.dumps(value).encode()
                os.pwrite(self._descriptor, data, 0)
                os.ftruncate(self._descriptor, len(data))


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Let one run at a time read and write leases, where there are locks: none sees another's half written."""
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)  # the folder itself: nothing is left of it
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def lease(cache: Path) -> Iterator[Lease]:
    """Hold what a run reads and writes in a cache until the body ends, however it ends."""
    path = cache / FOLDER / f"{time.time_ns():020d}-{secrets.token_hex(6)}.json"
    descriptor = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _turn(path.parent):  # between these two, it would look like a dead run's
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.EROFS, errno.EACCES, errno.EPERM}:
            _log.warning("%s", storage_error("write", path, error))
    try:
        yield Lease(path, descriptor)
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def held(cache: Path) -> Held:
    """Return what live runs hold; what a killed one left is removed."""
    segments: set[str] = set()
    since: int | None = None
    runs = 0
    with _turn(cache / FOLDER):
        for path in sorted((cache / FOLDER).glob("*.json")):
            said = _alive(path)
            if said is not None:
                runs += 1
                segments |= said.segments
                since = said.since if since is None else min(said.since, since)
    return Held(frozenset(segments), since, runs)


def seems_free(path: Path) -> bool:
    """Say whether a live run's lease could be locked here: then locks do not reach from the run's node to this one.

    Where there are no locks at all, it could not.
    """
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


class _Said(NamedTuple):
    since: int
    segments: set[str]
    claims: set[str]
    wants: set[str]


def _alive(path: Path) -> _Said | None:
    """Return what a lease says, or None where the run that wrote it is over."""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _said(path, file.read())
            except OSError:  # no locks here: it may be dead, and nobody waits for what it claimed
                said = _said(path, file.read())._replace(claims=set(), wants=set())
                return said if time.time() - path.stat().st_mtime < _LONGEST else None
            path.unlink(missing_ok=True)
    except OSError:
        pass
    return None


def _said(path: Path, data: bytes) -> _Said:
    try:
        value = json.loads(data)
        return _Said(int(value["since"]), *({str(v) for v in value[name]} for name in ("segments", "claims", "wants")))
    except (ValueError, KeyError, TypeError):
        # Being written: it holds at least what was published since it was begun.
        return _Said(int(path.name.partition("-")[0]), set(), set(), set())
