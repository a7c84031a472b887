"""How a cache was used: look-ups and what they touched, a line a run."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from proteus_pipeline.embeddings.index import now
from proteus_pipeline.stores.files import storage_error

_NAME = "uses.jsonl"
_READ_BYTES = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """One run's look-ups.

    Attributes
    ----------
    time
        Seconds since 1970.
    hits, derived, misses
        Of distinct keys.
    segments
        How many entries of each segment were read.
    redis
        What was had of Redis: `proteus_pipeline.embeddings.hot.HotRun.counts`.

    """

    time: float
    hits: int
    derived: int
    misses: int
    segments: Mapping[str, int] = field(default_factory=dict)
    redis: Mapping[str, int] = field(default_factory=dict)


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One short write to a file opened for appending: lines of several processes do not mix. An end of line in front:
        # what a crash cut short takes no other along.
        with (folder / _NAME).open("ab", buffering=0) as file:
            file.write(f"\n{json.dumps(value)}\n".encode())
    except OSError as error:
        _log.warning("%s", storage_error("write", folder / _NAME, error))


def uses(folder: Path) -> Iterator[Use]:
    """Yield the look-ups of a cache, the oldest first; a line that a crash cut short is passed over."""
    try:
        text = (folder / _NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    yield from filter(None, map(_use, text.splitlines()))


def _use(line: str) -> Use | None:
    """Return what a line says; None of one that is none."""
    try:
        value = json.loads(line)
        when = dt.datetime.fromisoformat(value["time"]).timestamp()
        segments = {str(k): int(v) for k, v in value.get("segments", {}).items()}
        redis = {str(k): int(v) for k, v in value.get("redis", {}).items()}
        return Use(when, int(value["hits"]), int(value["derived"]), int(value["misses"]), segments, redis)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


class LookUps:
    """The sums of a cache's look-ups. Each reading goes on where the last one ended: the account only grows.

    Attributes
    ----------
    hits, derived, misses
        Of distinct keys, of all runs that have ended.

    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._start_over()

    def _start_over(self, file: tuple[int, int] = (0, 0)) -> None:
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
                same = self._file == (found.st_dev, found.st_ino) and found.st_size >= self._read_bytes
                if not same:
                    self._start_over((found.st_dev, found.st_ino))
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
