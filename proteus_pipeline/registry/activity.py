"""How a registry was used. What left a tag is counted from the tags; only refused registrations leave none, and are
counted in .proteus/metrics/versions.jsonl, a line each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.backups import Backups
from proteus_pipeline.registry.events import History
from proteus_pipeline.registry.home import private_folder
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.weights import DvcCache

_DAY_S = 86400.0
_COUNTED = "versions.jsonl"


@dataclass(frozen=True)
class VersionMetrics:
    """A registry's metrics.

    Attributes
    ----------
    models, versions
        How many are live.
    registrations, rollbacks, deletions, restorations, adoptions
        How many there ever were: the tags say so, in every clone.
    conflicts
        Registrations refused because the version existed with other content, or had been deleted; counted in this clone.
    storage_bytes
        Bytes of the live versions' weights in the DVC cache; what versions share counts once.
    backup_bytes
        Bytes of the backups.
    updates_per_30_days
        Registrations in the last 30 days.
    seconds_since_update
        Since the newest registration; None before the first.

    """

    models: int
    versions: int
    registrations: int
    rollbacks: int
    deletions: int
    restorations: int
    adoptions: int
    conflicts: int
    storage_bytes: int
    backup_bytes: int
    updates_per_30_days: int
    seconds_since_update: float | None

    def to_json(self) -> dict[str, int | float | None]:
        return asdict(self)


def measure_activity(root: Path, histories: Sequence[History]) -> VersionMetrics:
    """Return the metrics of the registry at `root`, from its histories."""
    events = [event for history in histories for event in history.events]
    now = time.time()
    times = [e.time for e in events if e.kind == "registered"]

    def kinds(kind: str) -> int:
        return sum(1 for e in events if e.kind == kind)

    return VersionMetrics(
        models=sum(1 for h in histories if h.live),
        versions=sum(len(h.live) for h in histories),
        registrations=len(times),
        rollbacks=kinds("made current"),
        deletions=kinds("deleted"),
        restorations=kinds("restored"),
        adoptions=kinds("adopted"),
        conflicts=_counted(root, "conflict"),
        storage_bytes=_storage(root, histories),
        backup_bytes=Backups(root).size,
        updates_per_30_days=sum(1 for t in times if now - t <= 30 * _DAY_S),
        seconds_since_update=max(0.0, now - max(times)) if times else None,
    )


def count_event(root: Path, event: str) -> None:
    """Add one line for an event; a disk that is full or read-only loses the count, and nothing else."""
    line = json.dumps({"time": int(time.time()), "event": event}) + "\n"
    with suppress(OSError):
        folder = private_folder(root) / "metrics"
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / _COUNTED, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, line.encode())  # one short write: lines of several processes do not mix
        finally:
            os.close(descriptor)


def _counted(root: Path, event: str) -> int:
    try:
        text = (root / ".proteus" / "metrics" / _COUNTED).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return text.count(f'"event": "{event}"')


def _storage(root: Path, histories: Sequence[History]) -> int:
    """Return the bytes of the live versions' objects that are here."""
    cache = DvcCache(root)
    objects: set[str] = set()
    for history in histories:
        for event in history.live.values():
            if event.record is None:
                continue
            md5 = str(event.record.weights["md5"])
            objects.add(md5)
            with suppress(StorageError):  # a damaged list of files: verify names it
                objects |= set((cache.listing(Pointer(md5, 0, 0, history.name)) or {}).values())
    return sum(path.stat().st_size for path in map(cache.object, objects) if path.exists())
