"""Who waits for room, in their order: nobody is overtaken for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# For this share of their patience those who wait may be overtaken by who needs less: after it they come first.
_OVERTAKEN = 0.2


@dataclass(eq=False)
class Place:
    """One who waits.

    Attributes
    ----------
    since
        When they came.
    first_from
        From when on nobody who came later may go before them.

    """

    since: float
    first_from: float
    queue: Queue = field(repr=False)

    def is_next(self) -> bool:
        """Say whether nobody who has waited too long is before them."""
        return self.queue.is_next(self)

    def insist(self) -> None:
        """Be overtaken no more."""
        self.first_from = self.since

    @contextmanager
    def yielding(self) -> Iterator[None]:
        """Let everybody pass in a ``with`` block: it is one of them who does what this one waits for."""
        before, self.first_from = self.first_from, float("inf")
        try:
            yield
        finally:
            self.first_from = before


class Queue:
    """Those who wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: list[Place] = []

    @contextmanager
    def place(self, patience: float) -> Iterator[Place]:
        """Wait in a ``with`` block, for so many seconds at most."""
        now = time.monotonic()
        place = Place(now, now + _OVERTAKEN * patience, self)
        with self._lock:
            self._places.append(place)
        try:
            yield place
        finally:
            with self._lock:
                self._places.remove(place)

    def is_next(self, place: Place) -> bool:
        """Say whether all who came before are still content to be overtaken."""
        now = time.monotonic()
        with self._lock:
            return not any(p.since < place.since and p.first_from < now for p in self._places if p is not place)
