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
        From when on they want to be overtaken no more.
    first
        Whether nobody who came later may go before them now.

    """

    since: float
    first_from: float
    queue: Queue = field(repr=False)
    first: bool = False

    def is_next(self, *, feasible: bool) -> bool:
        """Say whether nobody is before them.

        `feasible` says whether they would have room once the calls and loads under way are done. Where they would not, they
        hold nobody up: it may be those who came later who have to end something first.
        """
        self.first = feasible and time.monotonic() > self.first_from
        return self.queue.is_next(self)

    def insist(self) -> None:
        """Want to be overtaken no more."""
        self.first_from = self.since


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
        """Say whether none of those who came before has to go first."""
        with self._lock:
            return not any(p.first and p.since < place.since for p in self._places)
