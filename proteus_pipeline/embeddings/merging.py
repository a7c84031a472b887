"""Many indexes into one run: which of them, and how, in little memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from proteus_pipeline.embeddings.index import HEAD_BYTES, Index, SegmentHeader, encode_head, header_text
from proteus_pipeline.identity import digests

if TYPE_CHECKING:
    from numpy.typing import NDArray

# So many index files are merged into a run, with the runs that are not much larger: look-ups stay a few searches.
MERGE_AT = 4
# A run of 1 GB, which is written in some seconds.
_MOST_MERGED = 1 << 24
# Merged at a time: some 64 MB of memory, whatever the size of what is merged.
_MERGED_ENTRIES = 1 << 18


def to_merge(new: Mapping[str, int], runs: Mapping[str, int], *, everything: bool = False) -> list[str]:
    """Return which indexes and runs, of so many entries each, are to become one run: all new ones, and small runs."""
    chosen, total = list(new), sum(new.values())
    for name, size in sorted(runs.items(), key=lambda run: run[1]):
        if total + size <= _MOST_MERGED and (everything or size <= 2 * total):
            chosen.append(name)
            total += size
    return chosen if len(chosen) > 1 or everything else []


def merge_indexes(path: Path, indexes: Sequence[Index], leave_out: Collection[str]) -> bool:
    """Write the entries of some indexes to one file, in little memory; False, and no file, where there are none.

    Parameters
    ----------
    path
        A file that does not exist.
    indexes
        A segment that several have is taken from the first.
    leave_out
        Segments.

    """
    headers: dict[str, SegmentHeader] = {}
    numbers = []
    for index in indexes:
        # One more than the segments, for numbers beyond them: damage, in a run that was not checked when it was opened.
        mapped = np.full(len(index.segments) + 1, -1, dtype=np.int64)
        for n, header in enumerate(index.segments):
            if header.segment not in leave_out and header.segment not in headers:
                mapped[n] = len(headers)
                headers[header.segment] = header
        numbers.append(mapped)
    if not headers:
        return False
    segments = list(headers.values())
    # There is room for it with all entries, of which some may be left out.
    length = len(header_text(sum(len(index.high) for index in indexes), "0" * 32, segments))
    with path.open("xb") as file:
        file.seek(HEAD_BYTES + length)
        body, entries = digests.Hasher(), 0
        # Twice over the indexes, since all high halves come before all records.
        for high, _ in _in_order(indexes, numbers):
            entries += len(high)
            _write_hashed(file, body, high)
        for _, records in _in_order(indexes, numbers):
            _write_hashed(file, body, records)
        text = header_text(entries, body.hexdigest(), segments).ljust(length)
        file.seek(0)
        file.write(encode_head(text) + text)
    return True


def _write_hashed(file: BinaryIO, body: digests.Hasher, part: NDArray[Any]) -> None:
    data = part.tobytes()
    body.update(data)
    file.write(data)


def _in_order(
    indexes: Sequence[Index], numbers: Sequence[NDArray[np.int64]]
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.void]]]:
    """Yield high halves and records of several indexes in the order of their keys, some at a time, renumbered."""
    total = sum(len(index.high) for index in indexes)
    # Keys are digests, so evenly spread: equal ranges of them hold about equally many.
    count = total // _MERGED_ENTRIES + 1
    bounds = np.array([(n << 64) // count for n in range(1, count)], dtype=np.uint64)
    ends = [[0, *np.searchsorted(index.high, bounds).tolist(), len(index.high)] for index in indexes]
    for n in range(count):
        keys, parts = [], []
        for index, mapped, end in zip(indexes, numbers, ends, strict=True):
            part = index.records[end[n] : end[n + 1]]
            number = mapped[np.minimum(part["segment"], len(mapped) - 1)]
            kept = np.flatnonzero(number >= 0)
            part = part[kept]
            part["segment"] = number[kept]
            keys.append(index.high[end[n] : end[n + 1]][kept])
            parts.append(part)
            index.forget()
        high, records = np.concatenate(keys), np.concatenate(parts)
        order = np.lexsort((records["low"], high))
        yield high[order], records[order]
