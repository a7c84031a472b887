"""The metrics of a project, or of a registry outside of one, at one moment."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_pipeline.config.composition import CONF, PARAMS
from proteus_pipeline.errors import ProteusError
from proteus_pipeline.metrics.catalogue import EMBEDDINGS, MODELS, MONITOR
from proteus_pipeline.metrics.readings import Readings
from proteus_pipeline.registry.activity import measure_activity
from proteus_pipeline.registry.listing import tags_of
from proteus_pipeline.registry.lookup import VersionLookup
from proteus_pipeline.registry.places import project_root
from proteus_pipeline.stages.project import Project
from proteus_pipeline.stores.counts import FOLDER, CountsFile
from proteus_pipeline.stores.files import storage_error
from proteus_pipeline.stores.live import announced

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.activity import CacheMeter
    from proteus_pipeline.registry.events import History

# What is measured by itself, so that the others are there where one can't be.
_PARTS = ("versions", "embeddings", "counts")


class Monitor:
    """Measures a registry and, where it is a project's, the project's cache of embeddings and what its processes counted.

    Parameters
    ----------
    home
        The registry's folder.
    overrides
        Hydra overrides, such as the cache's path.

    """

    def __init__(self, home: Path, overrides: Sequence[str] = ()) -> None:
        self.home, self._overrides = home, overrides
        root = project_root()
        ours = root is not None and root.resolve() == home.resolve()
        self._project = Project.find() if ours and (home / CONF / "config.yaml").is_file() else None
        self._histories: tuple[bytes | None, list[History]] = (None, [])
        self._meter: tuple[tuple[object, ...], CacheMeter] | None = None
        self._turn = threading.Lock()  # scrapes come when they like, and a cache is read by one thread at a time

    def measure(self) -> tuple[Readings, list[ProteusError]]:
        """Return the metrics, and why some of them can't be had; the others are there all the same."""
        readings, errors = Readings(MONITOR), list[ProteusError]()
        readings.set("proteus_build_info", 1, version=version("proteus_pipeline"))
        measures: tuple[Callable[[Readings], None], ...] = (self._versions, self._embeddings, self._counts)
        with self._turn:
            for part, measure in zip(_PARTS, measures, strict=True):
                try:
                    measure(readings)
                except OSError as error:
                    errors.append(error if isinstance(error, ProteusError) else storage_error("read", self.home, error))
                    readings.set("proteus_monitor_success", 0, part=part)
                except ProteusError as error:
                    errors.append(error)
                    readings.set("proteus_monitor_success", 0, part=part)
                else:
                    readings.set("proteus_monitor_success", 1, part=part)
        return readings, errors

    def _versions(self, readings: Readings) -> None:
        tags = tags_of(self.home) if (self.home / ".git").exists() else None
        if tags is None or tags != self._histories[0]:
            # Reading a thousand records takes a quarter of a second, and most scrapes find the tags of the last one.
            self._histories = tags, VersionLookup(self.home).histories()
        found = measure_activity(self.home, self._histories[1])
        for name in ("registrations", "rollbacks", "deletions", "restorations", "adoptions"):
            readings.set(f"proteus_version_{name}_total", getattr(found, name))
        readings.set("proteus_version_storage_bytes", found.storage_bytes)
        readings.set("proteus_version_backup_bytes", found.backup_bytes)
        if found.last_registration is not None:
            readings.set("proteus_version_last_registration_timestamp_seconds", found.last_registration)
        readings.set("proteus_models", found.models)
        readings.set("proteus_versions", found.versions)

    def _embeddings(self, readings: Readings) -> None:
        if self._project is None:
            return
        found = self._cache_meter(self._project).measure()
        for result, number in (("hit", found.hits), ("derived", found.derived), ("miss", found.misses)):
            readings.set("proteus_cache_requests_total", number, cache=EMBEDDINGS, result=result)
        sizes = {"segments": found.segment_bytes, "hidden": found.hidden_bytes, "indexes": found.index_bytes}
        for kind, nbytes in sizes.items():
            readings.set("proteus_cache_bytes", nbytes, cache=EMBEDDINGS, device="disk", kind=kind)
        if found.limit_bytes is not None:
            readings.set("proteus_cache_limit_bytes", found.limit_bytes, cache=EMBEDDINGS, device="disk")
        readings.set("proteus_cache_entries", found.entries, cache=EMBEDDINGS)
        readings.set("proteus_cache_segments", found.segments, cache=EMBEDDINGS)
        readings.set("proteus_cache_evictions_total", found.evictions, cache=EMBEDDINGS, cause="room")
        readings.set("proteus_cache_invalidations_total", found.invalidations, cache=EMBEDDINGS)
        readings.set("proteus_cache_leases", found.runs, cache=EMBEDDINGS)

    def _cache_meter(self, project: Project) -> CacheMeter:
        """Return the meter of the cache that the settings name, made anew when a file of theirs has changed."""
        from proteus_pipeline.embeddings.activity import CacheMeter
        from proteus_pipeline.stages.caching import settings_cache

        stamp = tuple(_stamps(project.work))
        if self._meter is None or self._meter[0] != stamp:
            self._meter = stamp, CacheMeter(settings_cache(project, self._overrides))
        return self._meter[1]

    def _counts(self, readings: Readings) -> None:
        folder = self.home / ".proteus" / FOLDER
        found = CountsFile(folder).totals()
        readings.zero()
        readings.add_counts(found)
        held = Counter({"cpu models": 0.0})
        for said in announced(folder):
            held.update(said)
        for name, nbytes in held.items():
            device, _, kind = name.rpartition(" ")
            if kind == "limit":
                readings.set("proteus_cache_limit_bytes", nbytes, cache=MODELS, device=device)
            else:
                readings.set("proteus_cache_bytes", nbytes, cache=MODELS, device=device, kind=kind)


def _stamps(root: Path) -> Iterator[tuple[Path, int]]:
    for path in (root / PARAMS, *sorted((root / CONF).rglob("*.yaml"))):
        try:
            yield path, path.stat().st_mtime_ns
        except OSError:
            continue
