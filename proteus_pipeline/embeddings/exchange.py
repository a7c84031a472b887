"""Whole segments from one cache to another: push and pull, through stores.

A segment is copied as it is, checked against its digest on arrival, and made visible by an index of its own; what is there
already is passed over, so that an interrupted copy goes on where it stopped. Invalidations go along.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from proteus_pipeline.embeddings.events import event_files, read_event
from proteus_pipeline.embeddings.index import INDEXES, Index, SegmentHeader, encode_index, key_strings
from proteus_pipeline.embeddings.publication import SEGMENTS
from proteus_pipeline.embeddings.visible import Visible
from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.identity import digests
from proteus_pipeline.stores.files import storage_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.stores.store import Store

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Copied:
    """What a push or a pull did.

    Attributes
    ----------
    segments, entries, nbytes
        That were copied.
    there
        Segments that the target had.
    events
        That were copied.

    """

    segments: int
    entries: int
    nbytes: int
    there: int
    events: int


def copy(
    source: Store, target: Store, *, wanted: Callable[[SegmentHeader], bool] = lambda _: True, dry_run: bool = False
) -> Copied:
    """Copy what a cache has and another lacks.

    Parameters
    ----------
    source, target
        Where the caches lie.
    wanted
        Says of a segment whether it is to be copied.
    dry_run
        Only count.

    Raises
    ------
    IntegrityError
        When a segment is damaged at its source: what was copied before it stays, and nothing of it is seen.
    StorageError
        When the one can't be read or the other not be written.

    """
    here, there = Visible(source), Visible(target)
    here.refresh()
    there.refresh()
    where = here.by_segment()
    chosen = [h for name, h in sorted(here.segments().items()) if wanted(h)]
    whole = _whole(target, there)
    missing = [h for h in chosen if h.digest not in whole and not _has_all(there, *where[h.segment])]
    if not dry_run:
        for header in missing:
            _copy_segment(source, target, header, *where[header.segment])
    # Last: an event that hides an older entry must not come before what replaces it. What else happened to the source's
    # files is of those files.
    events = [] if dry_run else _copy_events(source, target)
    return Copied(
        len(missing),
        sum(h.entries for h in missing),
        sum(h.segment_bytes for h in missing),
        len(chosen) - len(missing),
        len(events),
    )


def _whole(target: Store, there: Visible) -> set[str]:
    """Return the digests of the segments that a cache has, and shows whole."""
    cut = {s for e in there.events if e.kind == "quarantined" for s in e.segments}
    files = target.names(SEGMENTS)
    return {h.digest for name, h in there.segments().items() if name not in cut and name in files}


def _has_all(there: Visible, index: Index, rows: NDArray[np.int64]) -> bool:
    """Say whether a cache has the very numbers of all these entries, in other segments perhaps."""
    keys = key_strings(index.keys(rows))
    wanted = {key: index.record(int(row))[2].hex() for key, row in zip(keys, rows, strict=True)}
    found = there.find(list(wanted), mine=lambda: "")
    have = {(e.key, e.content) for e in found.entries()}
    return all(pair in have for pair in wanted.items())


def _copy_events(source: Store, target: Store) -> list[str]:
    copied = []
    for name in sorted(event_files(source) - event_files(target)):
        try:
            event = read_event(source, name)
        except FileNotFoundError:  # removed since
            continue
        if event.kind == "invalidated":
            target.write(name, source.read(name))
            copied.append(name)
    return copied


def _copy_segment(source: Store, target: Store, header: SegmentHeader, index: Index, rows: NDArray[np.int64]) -> None:
    # Under a name of its own, with the time of the old one: what the target once said of that name is not of this file.
    stem = f"{header.published:020d}-{secrets.token_hex(6)}"
    copied = replace(header, segment=f"{stem}.zip")
    name = f"{SEGMENTS}/{header.segment}"
    unfinished = target.begin(f"{SEGMENTS}/{copied.segment}")
    hashed = digests.Hasher()
    try:
        with unfinished.path.open("xb") as file:
            for offset in range(0, header.segment_bytes, _CHUNK_BYTES):
                data = source.read(name, offset, min(_CHUNK_BYTES, header.segment_bytes - offset))
                hashed.update(data)
                file.write(data)
        if hashed.hexdigest() != header.digest:
            raise IntegrityError(
                f"{source.location}/{name} is not the file that was written", "run: proteus cache verify --repair"
            )
        unfinished.publish()
    except StorageError:
        raise  # it says already what it is about
    except FileNotFoundError as error:
        raise StorageError(f"{source.location}/{name} is gone", "run: proteus cache verify --repair") from error
    except OSError as error:
        raise storage_error("write", unfinished.path, error) from error
    finally:
        unfinished.discard()
    records = index.records[rows]
    records["segment"] = 0
    target.write(f"{INDEXES}/{stem}.idx", encode_index([copied], index.keys(rows), records))
