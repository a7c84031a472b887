"""Which ranges of far files are asked for by one request."""

from __future__ import annotations

from collections.abc import Sequence

PART_BYTES = 8 << 20
"""A request's most bytes: a link of 1 MB/s carries it within the time that a request has."""
# What lies closer is read together: a request takes as long as 200 kB do at 10 MB/s and 20 ms.
_GAP_BYTES = 192 << 10
# Not all by one: many requests at a time are faster.
_SPAN_BYTES = 4 << 20


def spans_of(wanted: Sequence[tuple[str, int, int]], largest: int) -> list[tuple[str, int, int, list[int]]]:
    """Return the requests that some ranges take: a file, from where to where, and which of the ranges lie there.

    Parameters
    ----------
    wanted
        Of each range its file, offset and number of bytes; empty ones take none.
    largest
        No file is larger.

    >>> spans_of([("a", 900, 100), ("a", 0, 500), ("b", 0, 0), ("a", 1 << 30, 5)], 1 << 40)
    [('a', 0, 1000, [1, 0]), ('a', 1073741824, 1073741829, [3])]
    """
    spans: list[tuple[str, int, int, list[int]]] = []
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i][:2]):
        name, start, nbytes = wanted[i]
        if not nbytes or start >= largest:
            continue
        end = start + min(nbytes, largest)
        if spans:
            last, first, until, members = spans[-1]
            if last == name and start - until <= _GAP_BYTES and max(end, until) - first <= _SPAN_BYTES:
                members.append(i)
                spans[-1] = (name, first, max(end, until), members)
                continue
        spans.append((name, start, end, [i]))
    return spans
