"""What keeps a cache within its size, and rid of what nobody can reach: eviction, collection, compaction.

Nothing is removed before an event says so, so that no reader is told of what is going; and never what a live run holds.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings.events import CacheEvent, event_files, make_event, read_event, write_event
from proteus_pipeline.embeddings.found import Entry, entry_of
from proteus_pipeline.embeddings.index import Attestation, Index, SegmentHeader
from proteus_pipeline.embeddings.keys import key_strings
from proteus_pipeline.embeddings.leases import Held, held
from proteus_pipeline.embeddings.publication import SEGMENTS
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.usage import uses
from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.eviction.budget import to_evict
from proteus_pipeline.eviction.policies import Policy, make_policy
from proteus_pipeline.stores.files import TEMPORARY_PREFIX

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.cache import EmbeddingCache

EVICTED, REWRITTEN = "evicted", "written again"
# A writer that lives without a lease, as an import does, needs its unfinished file.
_YOUNGEST_SECONDS = 3600.0
GRACE_SECONDS = 14 * 86400.0
SMALL_BYTES = 16 << 20
"""Segments below this are written together, when there are a few of one kind."""
_FEW = 4
_MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Cleaning:
    """What is to go.

    Attributes
    ----------
    retired
        Segments that are hidden first, with the reason.
    removed
        Files whose time is over: of segments hidden long ago, and of writers that were killed.
    nbytes
        That the files of both have.
    kept
        Why some segments stay though they could go.

    """

    retired: dict[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    nbytes: int = 0
    kept: dict[str, str] = field(default_factory=dict)


def replayed(cache: EmbeddingCache, policy: str) -> Policy[str]:
    """Return a policy's books over a cache's segments: when each came, was used, and others were evicted."""
    books: Policy[str] = make_policy(policy)
    cache.refresh()
    steps: list[tuple[float, int, str, Any]] = []
    for segment, header in cache.visible.segments(hidden=True).items():
        steps.append((header.published / 1e9, 0, segment, header))
    for use in uses(cache.path):
        steps += [(use.time, 1, segment, use.runs) for segment in use.segments]
    for event in cache.visible.events:
        if event.kind == "retired":
            steps += [(event.time / 1e9, 2, segment, event.reason) for segment in event.segments]
    for when, kind, segment, what in sorted(steps, key=lambda step: step[:3]):
        if kind == 0:
            books.added(segment, what.segment_bytes, what.attestation.seconds, when)
        elif kind == 1:
            books.used(segment, when, what)
        elif what.startswith(EVICTED):
            books.evicted(segment)
        else:
            books.removed(segment)
    return books


def shrink(cache: EmbeddingCache, max_bytes: int, policy: str) -> Cleaning:
    """Evict whole segments until the cache fits into its budget, or only what live runs hold is left.

    Raises
    ------
    ConfigError
        For an unknown policy.
    StorageError
        When the cache can't be written.

    """
    books = replayed(cache, policy)
    headers = cache.visible.segments()
    hold = held(cache.path)
    total = _bytes_on_disk(cache)
    removed = []
    # First what was written again: its entries are there.
    for name in sorted(cache.visible.retired & cache.store.names(SEGMENTS)):
        if total > max_bytes and not hold.holds(name):
            size = _size(cache, f"{SEGMENTS}/{name}")
            cache.store.remove(f"{SEGMENTS}/{name}")
            removed.append(f"{SEGMENTS}/{name}")
            total -= size
    if total <= max_bytes:
        return Cleaning({}, tuple(removed))
    protected = {s for s in headers if hold.holds(s)}
    chosen = [s for s in to_evict(books, total, max_bytes, time=time.time(), protected=protected) if s in headers]
    nbytes = sum(headers[s].segment_bytes for s in chosen)
    kept = dict.fromkeys(protected, "a run holds it") if total - nbytes > max_bytes else {}
    cleaning = Cleaning(dict.fromkeys(chosen, f"{EVICTED} by {policy}"), tuple(removed), nbytes, kept)
    if chosen:
        write_event(cache.store, make_event("retired", f"{EVICTED} by {policy}", segments={s: [] for s in chosen}))
        for segment in chosen:
            cache.store.remove(f"{SEGMENTS}/{segment}")
        cache.refresh()
    return cleaning


def _bytes_on_disk(cache: EmbeddingCache) -> int:
    """Return the bytes of all segments that there are, visible or not, and of the indexes."""
    segments = sum(_size(cache, f"{SEGMENTS}/{name}") for name in cache.store.names(SEGMENTS))
    return segments + sum(index.nbytes for index in cache.visible.indexes)


def plan_collection(
    cache: EmbeddingCache, *, trunks: Collection[str] | None, grace: float = GRACE_SECONDS, now: float | None = None
) -> Cleaning:
    """Return what could go: entries of weights that nobody has, what was hidden long ago, what killed writers left.

    Parameters
    ----------
    cache
        That is collected.
    trunks
        Trunk digests of the weights that somebody has: of tags, and of composed.yaml. None where that is not known, as
        of a cache that several projects share: then no weights are unreachable.
    grace
        Seconds that segments stay after they were published, and files after their segment was hidden.
    now
        Seconds since 1970.

    """
    now = time.time() if now is None else now
    before = int((now - grace) * 1e9)
    cache.refresh()
    hold = held(cache.path)
    headers = cache.visible.segments(hidden=True)
    retired, kept = {}, {}
    hiding = _hiding(cache, headers.values())
    for segment, header in headers.items():
        why, event = "", hiding.get(segment)
        if event:
            why = "invalidated" if event.kind == "invalidated" else ""
        elif trunks is not None and header.trunk not in trunks:
            why = f"no version has weights {header.trunk[:12]}"
        since = event.time if event else header.published
        if why and hold.holds(segment):
            kept[segment] = "a run holds it"
        elif why and since >= before:
            kept[segment] = f"{why}, within the grace period"
        elif why:
            retired[segment] = why
    removed = list(_files_to_go(cache, before, hold))
    sizes = [_size(cache, f"{SEGMENTS}/{s}") for s in retired] + [_size(cache, name) for name in removed]
    return Cleaning(retired, tuple(removed), sum(sizes), kept)


def _hiding(cache: EmbeddingCache, headers: Iterable[SegmentHeader]) -> dict[str, CacheEvent]:
    """Return the first event that hides each hidden segment."""
    events = cache.visible.events
    hiding = {header.segment: next((e for e in events if e.hides(header)), None) for header in headers}
    return {segment: event for segment, event in hiding.items() if event}


def _files_to_go(cache: EmbeddingCache, before: int, hold: Held) -> Iterator[str]:
    """Yield files that were retired long ago, and what writers that were killed long ago left."""
    retired = {s: e.time for e in cache.visible.events if e.kind == "retired" for s in e.segments}
    for name in sorted(cache.store.names(SEGMENTS)):
        if retired.get(name, before) < before and not hold.holds(name):
            yield f"{SEGMENTS}/{name}"
    youngest = min(before, int((time.time() - _YOUNGEST_SECONDS) * 1e9), hold.since or before)
    folder = Path(cache.store.location)
    for path in sorted(folder.glob(f"*/{TEMPORARY_PREFIX}*")):
        try:
            if path.stat().st_mtime * 1e9 < youngest:
                yield str(path.relative_to(folder))
        except OSError:
            continue


def _size(cache: EmbeddingCache, name: str) -> int:
    try:
        return cache.store.size(name)
    except FileNotFoundError:
        return 0


def collect(cache: EmbeddingCache, cleaning: Cleaning) -> None:
    """Carry out what `plan_collection` returned; what happened in between is looked at again.

    Raises
    ------
    StorageError
        When the cache can't be written.

    """
    hold = held(cache.path)
    by_reason: dict[str, dict[str, list[str]]] = {}
    for segment, why in cleaning.retired.items():
        if not hold.holds(segment):
            by_reason.setdefault(why, {})[segment] = []
    for why, segments in by_reason.items():
        write_event(cache.store, make_event("retired", why, segments=segments))
    for segments in by_reason.values():
        for segment in segments:
            cache.store.remove(f"{SEGMENTS}/{segment}")
    for name in cleaning.removed:
        cache.store.remove(name)
    cache.refresh()
    cache.visible.merge(everything=True)
    _forget_events(cache)


def _forget_events(cache: EmbeddingCache) -> None:
    """Remove events of segments that are gone from everywhere."""
    cache.refresh()
    there = cache.store.names(SEGMENTS) | cache.visible.segments(hidden=True).keys()
    for name in sorted(event_files(cache.store)):
        try:
            event = read_event(cache.store, name)
        except FileNotFoundError:  # another one was quicker
            continue
        # Evictions stay: the policies learn from them.
        over = event.kind in {"retired", "quarantined"} and not event.reason.startswith(EVICTED)
        if over and not there & event.segments.keys():
            cache.store.remove(name)


def compact(cache: EmbeddingCache, *, small: int = SMALL_BYTES, everything: bool = False) -> int:
    """Write small segments of one kind together, and those of which half is hidden anew; return how many were replaced.

    New segments are published before the old ones are retired, and those stay on the disk for the grace period, or until
    the budget needs their room, since a reader may be about to read them.

    Raises
    ------
    StorageError
        When the cache can't be read or written.

    """
    cache.refresh()
    hold = held(cache.path)
    groups: dict[tuple[object, ...], list[SegmentHeader]] = {}
    dead = cache.visible.quarantined()
    for segment, header in sorted(cache.visible.segments().items()):
        if hold.holds(segment):
            continue
        half_dead = 2 * dead[segment] >= header.entries
        if header.segment_bytes < small or half_dead or everything:
            groups.setdefault(_kind(header), []).append(header)
    replaced = 0
    for headers in groups.values():
        half_dead = any(2 * dead[h.segment] >= h.entries for h in headers)
        if len(headers) >= _FEW or half_dead or everything:
            replaced += sum(rewrite(cache, part) for part in _parts(headers))
    return replaced


def _kind(header: SegmentHeader) -> tuple[object, ...]:
    a = header.attestation
    recipe = tuple(str(v) for _, v in sorted(header.recipe.items()))
    return header.trunk, recipe, header.width, a.device_class, a.torch, a.origin


def _parts(headers: Sequence[SegmentHeader]) -> Iterator[list[SegmentHeader]]:
    part: list[SegmentHeader] = []
    for header in headers:
        if part and sum(h.segment_bytes for h in part) + header.segment_bytes > _MOST_BYTES:
            yield part
            part = []
        part.append(header)
    if part:
        yield part


def rewrite(cache: EmbeddingCache, headers: Sequence[SegmentHeader]) -> int:
    """Write the sound entries of segments of one kind into a new one, and retire them; return how many were retired.

    The new one has the time of the oldest: what was invalidated after that stays so, here and wherever it is copied to.

    Raises
    ------
    StorageError
        When they can't be read or written: nothing is then retired. Only what is damaged is left behind.

    """
    cache.refresh()
    now = cache.visible.segments()
    headers = [h for h in headers if h.segment in now]  # hidden in the meantime
    if not headers:
        return 0
    where = cache.visible.by_segment()
    entries: dict[str, list[Entry]] = {}
    for header in headers:
        for entry in visible_entries(cache, where, header.segment):
            entries.setdefault(entry.key, []).append(entry)
    first = headers[0]
    oldest = min(h.published for h in headers)
    publication = cache.begin(first.trunk, Recipe.of_described(first.recipe), oldest, new=False)
    tokens, seconds = 0, 0.0
    try:
        for copies in entries.values():
            sound = _first_sound(cache, copies)
            if sound:
                entry, array, start = sound
                publication.add(entry.key, array, entry.length, start)
                tokens, seconds = tokens + entry.length + 2, seconds + entry.seconds
        a = first.attestation
        if len(publication):
            newest = max(h.attestation.time for h in headers)
            publication.publish(Attestation(a.device_class, a.torch, newest, round(seconds, 6), tokens, a.origin))
    finally:
        publication.discard()
    segments: dict[str, list[str]] = {h.segment: [] for h in headers}
    write_event(cache.store, make_event("retired", f"{REWRITTEN} as {publication.name}", segments=segments))
    cache.tidy()
    return len(headers)


def _first_sound(
    cache: EmbeddingCache, copies: Sequence[Entry]
) -> tuple[Entry, NDArray[np.generic], NDArray[np.generic] | None] | None:
    for entry in copies:
        try:
            array = cache.read(entry)
        except IntegrityError:
            continue  # damaged: a miss from now on, as it was. Any other error may be over soon
        try:
            return entry, array, cache.read_start(entry) if len(entry.shape) == 2 else None
        except IntegrityError:
            return entry, array, None
    return None


def visible_entries(
    cache: EmbeddingCache, where: Mapping[str, tuple[Index, NDArray[np.int64]]], segment: str
) -> list[Entry]:
    """Return a segment's visible entries, each once, in the order of the file.

    Parameters
    ----------
    cache
        Whose events hide some.
    where
        As `proteus_pipeline.embeddings.visible.Visible.by_segment` says.
    segment
        Its name.

    """
    if segment not in where:
        return []
    index, rows = where[segment]
    hidden = {k for e in cache.visible.events if e.kind == "quarantined" for k in e.segments.get(segment, ())}
    entries = {
        key: entry_of(key, index, index.record(int(row)))
        for key, row in zip(key_strings(index.keys(rows)), rows, strict=True)
    }
    return sorted((e for key, e in entries.items() if key not in hidden), key=lambda e: e.offset)
