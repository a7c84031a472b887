"""What a cache holds, by weights and recipe, and in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proteus_pipeline.embeddings.index import SegmentHeader
from proteus_pipeline.embeddings.lookup import EntryLookup
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES
from proteus_pipeline.embeddings.usage import last_used, uses


@dataclass(frozen=True)
class Content:
    """What a cache has by some weights and one recipe.

    Attributes
    ----------
    trunk, recipe
        Of all of it.
    entries, segments, nbytes
        How much.
    used
        When it was last read, or else written, seconds since 1970.

    """

    trunk: str
    recipe: Mapping[str, Any]
    entries: int
    segments: int
    nbytes: int
    used: float


def contents(cache: EntryLookup) -> list[Content]:
    """Return what there is by weights and recipe, the largest first."""
    cache.refresh()
    used = last_used(cache.path)
    kinds: dict[tuple[str, ...], list[SegmentHeader]] = {}
    for header in cache.visible.segments().values():
        described = tuple(f"{k}={v}" for k, v in sorted(header.recipe.items()))
        kinds.setdefault((header.trunk, *described), []).append(header)
    found = [
        Content(
            headers[0].trunk,
            headers[0].recipe,
            sum(h.entries for h in headers),
            len(headers),
            sum(h.segment_bytes for h in headers),
            max(used.get(h.segment, h.published / 1e9) for h in headers),
        )
        for headers in kinds.values()
    ]
    return sorted(found, key=lambda c: -c.nbytes)


def stats(cache: EntryLookup) -> dict[str, int]:
    """Return entries, segments, bytes on disk, raw_bytes they decode to, and hits, derived, misses so far.

    Of the hits, ``redis_hits`` came from Redis; ``redis_rejected`` values there were not what was put there.
    """
    cache.refresh()
    raw = entries = on_disk = 0
    segments = cache.visible.segments()
    for index in cache.visible.indexes:
        on_disk += index.nbytes
    lengths = cache.visible.residues()
    quarantined = cache.visible.quarantined()
    for header in segments.values():
        rows = lengths[header.segment] if header.layout == "per_residue" else header.entries
        raw += rows * header.width * NUMPY_DTYPES[header.stored].itemsize
        entries += header.entries - quarantined[header.segment]
        on_disk += header.segment_bytes
    used = list(uses(cache.path))
    counts = {field: sum(getattr(use, field) for use in used) for field in ("hits", "derived", "misses")}
    counts |= {f"redis_{name}": sum(use.redis.get(name, 0) for use in used) for name in ("hits", "rejected")}
    return {"entries": entries, "segments": len(segments), "bytes": on_disk, "raw_bytes": raw, **counts}


def stats_beneath(cache: EntryLookup) -> dict[str, Any] | None:
    """Return the shared cache's place, entries, segments and bytes; None for each where it can't be asked, and in all for none."""
    if cache.shared is None:
        return None
    cache.refresh()
    numbers: dict[str, int | None] = dict.fromkeys(("entries", "segments", "bytes"))
    if visible := cache.visible_beneath:
        segments, quarantined = visible.segments(), visible.quarantined()
        numbers = {
            "entries": sum(header.entries - quarantined[name] for name, header in segments.items()),
            "segments": len(segments),
            "bytes": sum(header.segment_bytes for header in segments.values()),
        }
    return {"place": str(cache.shared), **numbers}
