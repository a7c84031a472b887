"""Which ranges of far files are asked for by one request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Range = tuple[str, int, int]
"""A file, an offset, and a number of bytes."""
PART_BYTES = 8 << 20
"""A request's most bytes: a link of 1 MB/s carries it within the time that a request has. Larger files are sent in such parts, too."""
# What lies closer is read together: a request takes as long as 200 kB do at 10 MB/s and 20 ms.
_GAP_BYTES = 192 << 10


def spans_of(wanted: Sequence[Range], largest: int) -> list[tuple[str, int, int, list[int]]]:
    """Return the requests that some ranges take: a file, from where to where, and which of the ranges lie there.

    A request is for neighbours within one part of a file, as it was sent: servers keep parts, and one that is asked for bytes
    of a part may read the whole of it. A range that lies in two parts is in two requests. One that is longer than a part has
    its own.

    Parameters
    ----------
    wanted
        The ranges; empty ones take none.
    largest
        No file is larger.

    >>> spans_of([("a", 900, 100), ("a", 0, 500), ("b", 0, 0), ("a", (8 << 20) - 1, 2)], 1 << 40)
    [('a', 0, 1000, [1, 0]), ('a', 8388607, 8388608, [3]), ('a', 8388608, 8388609, [3])]
    """
    spans: list[tuple[str, int, int, list[int]]] = []
    for name, start, end, i in sorted(_pieces(wanted, largest)):
        if spans:
            last, first, until, members = spans[-1]
            together = first // PART_BYTES == (max(end, until) - 1) // PART_BYTES
            if last == name and start - until <= _GAP_BYTES and together:
                members.append(i)
                spans[-1] = (name, first, max(end, until), members)
                continue
        spans.append((name, start, end, [i]))
    return spans


def _pieces(wanted: Sequence[Range], largest: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield of each range what lies in one part, from where to where; all of one that is longer than a part."""
    for i, (name, start, nbytes) in enumerate(wanted):
        if not nbytes or start >= largest:
            continue
        end = start + min(nbytes, largest)
        for at, some in parts_of(start, end) if nbytes <= PART_BYTES else [(start, end - start)]:
            yield name, at, at + some, i


def parts_of(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield what a range has in each part of a file: where that begins, and how many bytes it is.

    >>> list(parts_of((8 << 20) - 1, (16 << 20) + 5))
    [(8388607, 1), (8388608, 8388608), (16777216, 5)]
    """
    while start < end:
        until = min(end, (start // PART_BYTES + 1) * PART_BYTES)
        yield start, until - start
        start = until


def cut(span: memoryview, first: int, start: int, nbytes: int) -> memoryview:
    """Return what a span that begins at `first` has of a range; nothing where it ended before."""
    return span[max(start - first, 0) : max(start + nbytes - first, 0)]


def joined(pieces: Sequence[memoryview]) -> memoryview:
    """Return the bytes of a range from its pieces, copied where there are several."""
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
