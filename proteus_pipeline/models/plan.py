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
