"""How a cache was used: look-ups and what they touched, a line a run."""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from proteus_pipeline.embeddings.index import now
from proteus_pipeline.stores.files import storage_error

_NAME = "uses.jsonl"
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
    for line in text.splitlines():
        try:
            value = json.loads(line)
            when = dt.datetime.fromisoformat(value["time"]).timestamp()
            segments = {str(k): int(v) for k, v in value.get("segments", {}).items()}
            redis = {str(k): int(v) for k, v in value.get("redis", {}).items()}
            yield Use(when, int(value["hits"]), int(value["derived"]), int(value["misses"]), segments, redis)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue


def last_used(folder: Path) -> dict[str, float]:
    """Return when each segment was last read, seconds since 1970."""
    times: dict[str, float] = {}
    for use in uses(folder):
        for segment in use.segments:
            times[segment] = max(use.time, times.get(segment, 0.0))
    return times
