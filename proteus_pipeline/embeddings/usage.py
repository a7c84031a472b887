"""How a cache was used: look-ups and what they touched, a line a run.

Lines are appended under the file's lock. One that has grown is replaced by what its lines come to, under the same lock: sums, and
of each segment that is still here how often and when last it was used, which is all that any reader, or eviction policy, makes of
them. Where a file system has no locks, nothing is replaced.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from proteus_pipeline.embeddings.index import now
from proteus_pipeline.embeddings.publication import SEGMENTS
from proteus_pipeline.stores.files import TEMPORARY_PREFIX, lock, storage_error, write_atomic

_NAME = "uses.jsonl"
COMPACT_BYTES = 1 << 20
"""The file is replaced by what it comes to when it has grown by so much beyond twice what it came to last."""
_HEAD_BYTES = 1 << 12
_LAST_SECOND = 253402300799  # of the year 9999: no ISO date is later
_READ_BYTES = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """One run's look-ups, or what those of several came to.

    Attributes
    ----------
    time
        Seconds since 1970; of several, the latest.
    hits, derived, misses
        Of distinct keys.
    segments
        How many entries of each segment were read.
    redis
        What was had of Redis: `proteus_pipeline.embeddings.hot.HotRun.counts`.
    runs
        How many runs read each of the segments.

    """

    time: float
    hits: int
    derived: int
    misses: int
    segments: Mapping[str, int] = field(default_factory=dict)
    redis: Mapping[str, int] = field(default_factory=dict)
    runs: int = 1


def record_use(
    folder: Path,
    hits: int,
    derived: int,
    misses: int,
    segments: Mapping[str, int],
    redis: Mapping[str, int] | None = None,
) -> None:
    """Add a run's look-ups to a cache's account; where that can't be, say so and go on."""
    value = {"time": now(), "hits": hits, "derived": derived, "misses": misses, "segments": dict(segments)}
    value |= {"redis": counted} if (counted := {k: n for k, n in (redis or {}).items() if n}) else {}
    # One write. An end of line in front: what a crash cut short takes no other along.
    line = f"\n{json.dumps(value)}\n".encode()
    path = folder / _NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(path) as (file, locked):
            file.write(line)
            if locked and _is_due(file):
                with suppress(OSError):  # what was added is there, and the next one tries again
                    _compact(path, file)
    except OSError as error:
        _log.warning("%s", storage_error("write", path, error))


@contextmanager
def _turn(path: Path) -> Iterator[tuple[FileIO, bool]]:
    """Yield the account, open for appending, and whether nobody else appends meanwhile: not so where there are no locks."""
    while True:
        with path.open("a+b", buffering=0) as file:
            locked = lock(file.fileno())
            if locked and not _is_at(path, file):
                continue  # it was replaced while we waited
            yield file, locked
            return


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_due(file: FileIO) -> bool:
    size = os.fstat(file.fileno()).st_size
    if size <= COMPACT_BYTES:
        return False
    file.seek(0)
    try:
        came_to = int(json.loads(file.read(_HEAD_BYTES).partition(b"\n")[0])["compacted"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        came_to = 0  # its first line is a run's
    return size > COMPACT_BYTES + 2 * came_to


def _compact(path: Path, file: FileIO) -> None:
    """Replace the account by what it comes to, and remove what killed processes left of that; the caller has the lock."""
    for left in path.parent.glob(f"{TEMPORARY_PREFIX}*{path.suffix}"):
        left.unlink(missing_ok=True)
    try:
        here = {file.name for file in (path.parent / SEGMENTS).iterdir()}
    except FileNotFoundError:
        here = set()
    # Not by `uses`, which takes what can't be read for nothing.
    found = _said(path.read_text(encoding="utf-8", errors="replace"))
    write_atomic(path, _came_to(found, here), mode=stat.S_IMODE(os.fstat(file.fileno()).st_mode))


def _came_to(found: Iterable[Use], here: Collection[str]) -> bytes:
    """Return an account of equal sums, with equal uses of those segments that are here."""
    sums = Counter(hits=0, derived=0, misses=0)
    redis, runs, entries = Counter[str](), Counter[str](), Counter[str]()
    latest, last = 0.0, dict[str, float]()
    for use in found:
        sums.update(hits=use.hits, derived=use.derived, misses=use.misses)
        redis.update(use.redis)
        latest = max(latest, use.time)
        for segment, count in use.segments.items():
            if segment in here:
                last[segment] = max(use.time, last.get(segment, 0.0))
                runs[segment] += use.runs
                entries[segment] += count
    alike: dict[tuple[float, int], dict[str, int]] = {}
    for segment, when in last.items():
        alike.setdefault((when, runs[segment]), {})[segment] = entries[segment]
    nothing = dict.fromkeys(sums, 0)
    lines = [
        json.dumps({"time": _iso(when), **nothing, "segments": segments, "runs": number})
        for (when, number), segments in sorted(alike.items())
    ]
    rest = "".join(f"{line}\n" for line in lines)
    head = {"time": _iso(latest), "compacted": len(rest), **sums, "segments": {}, "redis": dict(redis)}
    return f"{json.dumps(head)}\n{rest}".encode()


def _iso(when: float) -> str:
    return dt.datetime.fromtimestamp(min(max(when, 0.0), _LAST_SECOND), dt.UTC).isoformat()


def uses(folder: Path) -> Iterator[Use]:
    """Yield the look-ups of a cache, in the order of their entry; a line that a crash cut short is passed over."""
    try:
        text = (folder / _NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    yield from _said(text)


def _said(text: str) -> Iterator[Use]:
    return filter(None, map(_use, text.splitlines()))


def _use(line: str) -> Use | None:
    """Return what a line says; None of one that is none."""
    try:
        value = json.loads(line)
        when = dt.datetime.fromisoformat(value["time"]).timestamp()
        segments = {str(k): int(v) for k, v in value.get("segments", {}).items()}
        redis = {str(k): int(v) for k, v in value.get("redis", {}).items()}
        sums = int(value["hits"]), int(value["derived"]), int(value["misses"])
        return Use(when, *sums, segments, redis, int(value.get("runs", 1)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


class LookUps:
    """The sums of a cache's look-ups. Each reading goes on where the last one ended, in the same file.

    Attributes
    ----------
    hits, derived, misses
        Of distinct keys, of all runs that have ended.

    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._start_over()

    def _start_over(self, file: tuple[int, int, bytes] = (0, 0, b"")) -> None:
        self.hits = self.derived = self.misses = 0
        self._file, self._read_bytes = file, 0

    def read(self) -> None:
        """Add what was appended since the last time; begin anew where it is another file.

        Raises
        ------
        StorageError
            When it is there, and can't be read.

        """
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                # By its first line too: the number of a file that was replaced is another's soon.
                which = found.st_dev, found.st_ino, file.readline(_HEAD_BYTES)
                if self._file != which or found.st_size < self._read_bytes:
                    self._start_over(which)
                file.seek(self._read_bytes)
                while lines := file.readlines(_READ_BYTES):
                    for line in lines:
                        self._add(line)
        except FileNotFoundError:
            self._start_over()
        except OSError as error:
            raise storage_error("read", self._path, error) from error

    def _add(self, line: bytes) -> None:
        if not line.endswith(b"\n"):
            return  # being written: next time
        self._read_bytes += len(line)
        if use := _use(line.decode("utf-8", "replace")):
            self.hits, self.derived, self.misses = (
                self.hits + use.hits,
                self.derived + use.derived,
                self.misses + use.misses,
            )


def last_used(folder: Path) -> dict[str, float]:
    """Return when each segment was last read, seconds since 1970."""
    times: dict[str, float] = {}
    for use in uses(folder):
        for segment in use.segments:
            times[segment] = max(use.time, times.get(segment, 0.0))
    return times
