"""Whole segments from one cache to another: push and pull, through stores.

A segment is copied under its name, checked against its digest on arrival, and made visible by an index of its own; what
is there already is passed over, so that an interrupted copy goes on where it stopped. Events that hide entries go along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from proteus_pipeline.embeddings.events import FOLDER as EVENTS
from proteus_pipeline.embeddings.index import SegmentHeader, encode_index
from proteus_pipeline.embeddings.publication import SEGMENTS
from proteus_pipeline.embeddings.visible import INDEXES, Visible
from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.identity import digests
from proteus_pipeline.stores.files import storage_error

if TYPE_CHECKING:
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
    known = there.segments(hidden=True)
    chosen = [h for name, h in sorted(here.segments().items()) if wanted(h)]
    missing = [h for h in chosen if h.segment not in known]
    if not dry_run:
        for header in missing:
            _copy_segment(source, target, here, header)
    # Last: an event that hides an older entry must not come before what replaces it.
    events = sorted(source.names(EVENTS) - target.names(EVENTS))
    if not dry_run:
        for name in events:
            target.write(f"{EVENTS}/{name}", source.read(f"{EVENTS}/{name}"))
    return Copied(
        len(missing),
        sum(h.entries for h in missing),
        sum(h.segment_bytes for h in missing),
        len(chosen) - len(missing),
        len(events),
    )


def _copy_segment(source: Store, target: Store, here: Visible, header: SegmentHeader) -> None:
    name = f"{SEGMENTS}/{header.segment}"
    unfinished = target.begin(name)
    hashed = digests.Hasher()
    try:
        with unfinished.path.open("xb") as file:
            for offset in range(0, header.segment_bytes, _CHUNK_BYTES):
                data = source.read(name, offset, _CHUNK_BYTES)
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
    target.write(f"{INDEXES}/{header.segment.removesuffix('.zip')}.idx", _index_of(here, header))


def _index_of(here: Visible, header: SegmentHeader) -> bytes:
    """Return the index of one segment, from whichever index or run has it."""
    for index in here.indexes:
        numbers = [n for n, s in enumerate(index.segments) if s.segment == header.segment]
        if numbers:
            rows = np.flatnonzero(index.records["segment"] == numbers[0])
            records = index.records[rows]
            records["segment"] = 0
            return encode_index([header], index.keys(rows), records)
    raise StorageError(f"no index names {header.segment} any more", "run it again")
