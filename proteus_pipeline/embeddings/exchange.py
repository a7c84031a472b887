"""Whole segments from one cache to another: push and pull, through stores.

A segment is copied as it is, checked against its digest on arrival, and made visible by an index of its own; what is there
already is passed over, so that an interrupted copy goes on where it stopped. Invalidations go along.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from proteus_pipeline.embeddings.events import event_files, read_event
from proteus_pipeline.embeddings.index import INDEXES, Index, SegmentHeader, encode_index
from proteus_pipeline.embeddings.keys import key_strings
from proteus_pipeline.embeddings.publication import SEGMENTS
from proteus_pipeline.embeddings.visible import Visible
from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.identity import digests
from proteus_pipeline.stores.files import storage_error
from proteus_pipeline.stores.places import scheme_of

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from proteus_pipeline.stores.store import Store

_CHUNK_BYTES = 16 << 20
# Segments under way at a time, each with a chunk in memory: one alone leaves a line idle between its requests.
_COPYING = 4


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
        When a segment is damaged at its source: nothing of it is seen, and all others are copied.
    StorageError
        When the one can't be read or the other not be written.

    """
    here, there = Visible(source), Visible(target)
    here.refresh()
    there.refresh()
    where = here.by_segment()
    # What the target has invalidated would arrive hidden, and so be missing again at the next copy.
    dead = [e for e in there.events if e.kind == "invalidated"]
    chosen = [h for _, h in sorted(here.segments().items()) if wanted(h) and not any(e.hides(h) for e in dead)]
    # An index may name a segment that was removed, and copied there again under another name.
    lies = source.names(SEGMENTS)
    again = {h.digest for h in chosen if h.segment in lies}
    chosen = [h for h in chosen if h.segment in lies or h.digest not in again]
    files = target.names(SEGMENTS)
    whole = _whole(files, there)
    missing = [h for h in chosen if h.digest not in whole and not _has_all(files, there, *where[h.segment])]
    if not dry_run:
        _copy_all(source, target, missing, where)
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


def _whole(files: set[str], there: Visible) -> set[str]:
    """Return the digests of the segments that a cache has, and shows whole."""
    cut = {s for e in there.events if e.kind == "quarantined" for s in e.segments}
    return {h.digest for name, h in there.segments().items() if name not in cut and name in files}


def _has_all(files: set[str], there: Visible, index: Index, rows: NDArray[np.int64]) -> bool:
    """Say whether a cache has the very numbers of all these entries, in other segments perhaps."""
    keys = key_strings(index.keys(rows))
    wanted = {key: index.record(int(row))[3].hex() for key, row in zip(keys, rows, strict=True)}
    found = there.find(list(wanted), mine=lambda: "")
    have = {(e.key, e.content) for e in found.entries() if e.segment in files}
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


def _copy_all(
    source: Store,
    target: Store,
    headers: Sequence[SegmentHeader],
    where: Mapping[str, tuple[Index, NDArray[np.int64]]],
) -> None:
    damaged: list[IntegrityError] = []

    def one(header: SegmentHeader) -> None:
        index, rows = where[header.segment]
        try:
            copy_segment(source, target, header, index.keys(rows), index.records[rows])
        except IntegrityError as error:
            damaged.append(error)

    with ThreadPoolExecutor(_COPYING, "copy") as pool:
        futures = [pool.submit(one, header) for header in headers]
        try:
            for done in wait(futures, return_when=FIRST_EXCEPTION).done:
                done.result()
        finally:
            for future in futures:
                future.cancel()
    if damaged:
        more = f", and so are {len(damaged) - 1} others" if len(damaged) > 1 else ""
        raise IntegrityError(f"{damaged[0].what}{more}", damaged[0].remedy)


def copy_segment(
    source: Store, target: Store, header: SegmentHeader, keys: NDArray[np.void], records: NDArray[np.void]
) -> None:
    """Copy one segment, checked on the way, and make its entries visible.

    Parameters
    ----------
    source, target
        From where, and where to.
    header
        What holds for it.
    keys, records
        Its entries.

    Raises
    ------
    IntegrityError
        When it is damaged at its source.
    StorageError
        When the one can't be read or the other not be written.

    """
    # Under a name of its own, with the time of the old one: what the target once said of that name is not of this file.
    stem = f"{header.published:020d}-{secrets.token_hex(6)}"
    copied = replace(header, segment=f"{stem}.zip")
    name = f"{SEGMENTS}/{header.segment}"
    unfinished = target.begin(f"{SEGMENTS}/{copied.segment}")
    try:
        with source.at_hand(name) as path:
            # A file to be sent need not be copied first: that took a tenth of an upload.
            if path and path.stat().st_size == header.segment_bytes and unfinished.take(path):
                digest = digests.of_file(path)
            else:
                digest = _copied(source, name, header.segment_bytes, unfinished.path)
            if digest != header.digest:
                raise IntegrityError(f"{source.location}/{name} is not the file that was written", _remedy(source))
            unfinished.publish()
    except StorageError:
        raise  # it says already what it is about
    except FileNotFoundError as error:
        raise StorageError(f"{source.location}/{name} is gone", _remedy(source)) from error
    except OSError as error:
        raise storage_error("write", unfinished.path, error) from error
    finally:
        unfinished.discard()
    records = records.copy()
    records["segment"] = 0
    target.write(f"{INDEXES}/{stem}.idx", encode_index([copied], keys, records))


def _copied(source: Store, name: str, nbytes: int, path: Path) -> str:
    """Copy so many bytes of a file, and return their digest: none that it could have where there are fewer."""
    hashed = digests.Hasher()
    with path.open("xb") as file:
        for offset in range(0, nbytes, _CHUNK_BYTES):
            wanted = min(_CHUNK_BYTES, nbytes - offset)
            data = source.read(name, offset, wanted)
            if len(data) < wanted:
                return ""  # whatever its index says: a damaged one may say 2^60 bytes
            hashed.update(data)
            file.write(data)
    return hashed.hexdigest()


def _remedy(source: Store) -> str:
    if scheme_of(source.location):
        return "remove it there, and push again from a cache that has it"
    return "run: proteus cache verify --repair"
