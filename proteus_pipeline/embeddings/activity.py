"""How a cache was used, and what it takes, from what lies in its folder: looked at as often as a scrape asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_pipeline.embeddings.housekeeping import EVICTED
from proteus_pipeline.embeddings.leases import held
from proteus_pipeline.embeddings.publication import SEGMENTS
from proteus_pipeline.embeddings.usage import LookUps

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.cache import EmbeddingCache


@dataclass(frozen=True)
class CacheActivity:
    """A cache's numbers.

    Attributes
    ----------
    entries, segments
        That can be read.
    segment_bytes, hidden_bytes, index_bytes
        On disk: of those segments, of segments that an event hides or no index names, and of the indexes.
    limit_bytes
        None where there is no limit.
    hits, derived, misses
        Look-ups of distinct sequences, as uses.jsonl has them.
    evictions
        Segments evicted, as the events have it: those of evictions are kept for ever.
    invalidations
        How many there were.
    runs
        That hold something now.

    """

    entries: int
    segments: int
    segment_bytes: int
    hidden_bytes: int
    index_bytes: int
    limit_bytes: int | None
    hits: int
    derived: int
    misses: int
    evictions: int
    invalidations: int
    runs: int


class CacheMeter:
    """Measures one cache again and again; what was read of its account is not read twice."""

    def __init__(self, cache: EmbeddingCache) -> None:
        self.cache = cache
        self._look_ups = LookUps(cache.path)

    def measure(self) -> CacheActivity:
        """Return the numbers of this moment.

        Raises
        ------
        StorageError
            When the cache can't be read, or an event of it is damaged.

        """
        cache = self.cache
        cache.refresh()
        headers, quarantined = cache.visible.segments(), cache.visible.quarantined()
        events = cache.visible.events
        visible = sum(header.segment_bytes for header in headers.values())
        hidden = sum(self._size(name) for name in cache.store.names(SEGMENTS) - headers.keys())
        self._look_ups.read()
        return CacheActivity(
            entries=sum(header.entries - quarantined[name] for name, header in headers.items()),
            segments=len(headers),
            segment_bytes=visible,
            hidden_bytes=hidden,
            index_bytes=sum(index.nbytes for index in cache.visible.indexes),
            limit_bytes=cache.max_bytes,
            hits=self._look_ups.hits,
            derived=self._look_ups.derived,
            misses=self._look_ups.misses,
            evictions=sum(len(e.segments) for e in events if e.kind == "retired" and e.reason.startswith(EVICTED)),
            invalidations=len(cache.visible.invalidations()),
            runs=held(Path(cache.path)).runs,
        )

    def _size(self, name: str) -> int:
        try:
            return self.cache.store.size(f"{SEGMENTS}/{name}")
        except FileNotFoundError:
            return 0  # evicted meanwhile
