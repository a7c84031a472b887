"""A few numbers by which two arrays can be compared where only one of them is at hand.

A content hash says whether two arrays are equal, and nothing of how far they are apart. A sketch does: its projections are
linear, so the difference of two arrays' projections is the projection of their difference, and with random signs its square
is, in expectation, their squared L2 distance. Four are enough: a distance is taken for less than a quarter of what it is in
1 of 100 embeddings, and one changed element shows in full in each.

Signs are bits of splitmix64. Sums are in fp64, one row after the other, and over the columns correctly rounded: no vector
width, thread or library enters, and an array has one sketch everywhere. Nine digits tell fp32 numbers apart; the least
distance that they show is some 1e-8 of the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from proteus_pipeline.embeddings.stored import to_fp32

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROJECTIONS = 4
_DIGITS = 9
# Rows that are so far apart share their columns' signs, but for one of their own: so one pass makes all projections.
_PERIOD = 64

Sketch = tuple[str, ...]


def sketch(array: NDArray[np.generic], stored: str) -> Sketch:
    """Return the L2 norm and the projections of a stored array, (D,) or (L, D), as decimals.

    >>> sketch(np.array([3.0, 4.0], dtype="<f4"), "fp32")
    ('5', '-7', '7', '-1', '-1')
    """
    rows = np.atleast_2d(to_fp32(array, stored))
    length, width = rows.shape
    used = min(length, _PERIOD)
    squares, sums = np.zeros((used, width)), np.zeros((used, width))
    signs = _signs(length, seed=1)[0][:, None]
    for start in range(0, length, _PERIOD):
        block = rows[start : start + _PERIOD].astype(np.float64)
        squares[: len(block)] += block * block
        sums[: len(block)] += block * signs[start : start + _PERIOD]
    columns = _signs(_PERIOD * width, seed=2).reshape(PROJECTIONS, _PERIOD, width)
    norm = math.sqrt(math.fsum(np.add.reduce(squares, axis=0).tolist()))
    projected = (math.fsum(np.add.reduce(sums * of_rows[:used], axis=0).tolist()) for of_rows in columns)
    return tuple(f"{number + 0.0:.{_DIGITS}g}" for number in (norm, *projected))


def distance(one: Sequence[str], other: Sequence[str]) -> float:
    """Return how far apart two arrays are by their sketches: L2, relative to the second's norm.

    >>> distance(("5", "-7", "7", "-1", "-1"), ("5", "-7", "7", "-1", "-1"))
    0.0
    """
    (norm, *first), (own, *second) = map(float, one), map(float, other)
    apart = max(abs(norm - own), math.dist(first, second) / math.sqrt(len(first)))
    return apart / own if own else math.inf if apart else 0.0


@lru_cache(8)
def _signs(count: int, seed: int) -> NDArray[np.float64]:
    """Return (PROJECTIONS, count) random signs: the lowest bits of splitmix64's outputs."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return 1.0 - 2.0 * ((z >> np.arange(PROJECTIONS, dtype=np.uint64)[:, None]) & np.uint64(1)).astype(np.float64)
