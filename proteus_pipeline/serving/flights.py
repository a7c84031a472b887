"""Loads under way: one for all who ask for the same model, and none too soon after one that failed.

Whoever uses it holds a lock around each call.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

FIRST_BACK_OFF, _LONGEST_BACK_OFF = 0.5, 30.0  # seconds


@dataclass(eq=False)
class Flight(Generic[T]):
    """A load under way, and how many wait for it beside the one who loads."""

    done: Future[T] = field(default_factory=Future)
    waiting: int = 0


@dataclass(frozen=True)
class _Failure:
    error: Exception
    until: float
    pause: float


class Flights(Generic[T]):
    """Loads by key."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight[T]] = {}
        self._failed: dict[str, _Failure] = {}

    def join(self, key: str) -> tuple[Flight[T], bool]:
        """Return the load of a key, and whether the caller has to do it.

        Raises
        ------
        Exception
            What the last load raised, while the pause after it lasts.

        """
        if flight := self._flights.get(key):
            flight.waiting += 1
            return flight, False
        failed = self._failed.get(key)
        if failed and time.monotonic() < failed.until:
            raise failed.error
        flight = self._flights[key] = Flight()
        return flight, True

    def landed(self, key: str) -> None:
        """End a load that went well."""
        del self._flights[key]
        self._failed.pop(key, None)

    def failed(self, key: str, error: Exception, *, pause: bool) -> None:
        """End a load that failed; whoever asks within a pause that doubles each time is told the same."""
        del self._flights[key]
        if pause:
            before = self._failed.get(key)
            seconds = min(2 * before.pause, _LONGEST_BACK_OFF) if before else FIRST_BACK_OFF
            self._failed[key] = _Failure(error, time.monotonic() + seconds, seconds)
