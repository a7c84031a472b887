"""Which sequences share a pass through the encoder: a pure function of their lengths."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences so that each group has at most `budget` tokens, and wastes few of them.

    Best fit, longest first: each sequence joins the group it fills best. A sequence longer than the budget is a group
    of its own. Every index appears once; groups come longest member first.

    Parameters
    ----------
    lengths
        Tokens of each sequence, start and end token included.
    budget
        Tokens a group may have.

    Returns
    -------
    list of list of int
        Indices into `lengths`.

    >>> plan_batches([30, 100, 70], budget=100)
    [[1], [2, 0]]

    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted: the tightest group that fits is one bisection away
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[index]
        place = bisect_left(room, (need, -1))
        if place == len(room):
            groups.append([index])
            left, group = budget - need, len(groups) - 1
        else:
            left, group = room.pop(place)
            groups[group].append(index)
            left -= need
        if left > 0:
            room.insert(bisect_left(room, (left, group)), (left, group))
    return groups


def tile_of(length: int, sizes: Sequence[int]) -> int:
    """Return how many rows a sequence's tiles have: the smallest of the ascending sizes that it fits in, or the largest.

    >>> [tile_of(length, (48, 256)) for length in (3, 48, 49, 1000)]
    [48, 48, 256, 256]
    """
    return next((size for size in sizes if length <= size), sizes[-1])


def plan_in_tiles(lengths: Sequence[int], budget: int, sizes: Sequence[int]) -> list[list[int]]:
    """Plan batches of sequences whose tiles are of one size: a batch that is filled up to whole tiles is so only once.

    >>> plan_in_tiles([30, 100, 70, 20], budget=100, sizes=(48, 256))
    [[1], [2], [0, 3]]
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(tile_of(length, sizes), []).append(index)
    return [
        [group[i] for i in batch]
        for _, group in sorted(groups.items(), reverse=True)
        for batch in plan_batches([lengths[i] for i in group], budget)
    ]


def plan_tiles(lengths: Sequence[int], sizes: Sequence[int], *, whole: bool) -> tuple[list[slice], list[slice]]:
    """Lay sequences out in rows, and the rows in tiles.

    A sequence lies in tiles of the smallest size that it fits in, or of the largest one: its length alone decides. Sequences of
    one size lie back to back, and may share a tile or lie in several; the largest size comes first.

    Parameters
    ----------
    lengths
        Tokens of each sequence; at least one sequence.
    sizes
        Rows of a tile, the fewest first.
    whole
        Whether all tiles are filled up to their size. If not, all sequences lie back to back, in tiles of the largest size; the
        last one is as long as they are.

    Returns
    -------
    rows, tiles
        Where each sequence lies, and each tile; the last tile ends where all rows do.

    >>> rows, tiles = plan_tiles([300, 30, 10], (48, 256), whole=True)
    >>> [(part.start, part.stop) for part in rows], [(part.start, part.stop) for part in tiles]
    ([(0, 300), (512, 542), (542, 552)], [(0, 256), (256, 512), (512, 560)])

    """
    largest = sizes[-1]
    size_of = [tile_of(length, sizes) if whole else largest for length in lengths]
    rows, tiles, end = [slice(0)] * len(lengths), list[slice](), 0
    for size in reversed(sizes):
        start = end
        for index in (i for i, s in enumerate(size_of) if s == size):
            rows[index] = slice(end, end + lengths[index])
            end += lengths[index]
        if whole:
            end = start - (start - end) // size * size
        tiles += [slice(first, min(first + size, end)) for first in range(start, end, size)]
    return rows, tiles
