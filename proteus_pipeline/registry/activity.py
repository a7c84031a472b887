"""How a registry was used. What left a tag is counted from the tags; only refused registrations leave none, and are
counted in .proteus/metrics.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from proteus_pipeline.errors import StorageError
from proteus_pipeline.metrics.lines import increments, series
from proteus_pipeline.registry.backups import Backups
from proteus_pipeline.registry.events import History
from proteus_pipeline.registry.home import private_folder
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.weights import DvcCache
from proteus_pipeline.stores.counts import FOLDER, CountsFile

_DAY_S = 86400.0
CONFLICTS = "proteus_version_conflicts_total"


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
    last_registration
        When that was, seconds since 1970.

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
    last_registration: int | None

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
        conflicts=_conflicts(root),
        storage_bytes=_storage(root, histories),
        backup_bytes=Backups(root).size,
        updates_per_30_days=sum(1 for t in times if now - t <= 30 * _DAY_S),
        seconds_since_update=max(0.0, now - max(times)) if times else None,
        last_registration=max(times, default=None),
    )


def count_event(root: Path, name: str, value: float = 1, **labels: str) -> None:
    """Count what leaves no tag; a disk that is full or read-only loses the count, and nothing else.

    Parameters
    ----------
    root
        Of the registry.
    name, value, labels
        As in `proteus_pipeline.metrics.lines.increments`.

    """
    with suppress(OSError):
        CountsFile(private_folder(root) / FOLDER).add(increments(name, value, labels))


def _conflicts(root: Path) -> int:
    try:
        return int(CountsFile(root / ".proteus" / FOLDER).totals().get(series(CONFLICTS, {}), 0))
    except StorageError:
        return 0


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
