"""Loads under way: one for all who ask for the same model, and none too soon after one that failed.

Whoever uses it holds a lock around each call.
"""

from __future__ import annotations

import copy
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

FIRST_BACK_OFF, _LONGEST_BACK_OFF = 0.5, 30.0  # seconds


@dataclass(eq=False)
class Flight(Generic[T]):
    """A load under way.

    Attributes
    ----------
    done
        Its result, once there is one.
    waiting
        How many wait for it beside the one who loads.
    landed
        What was loaded, from the moment at which those who wait were counted.
    dropped
        Why what is being loaded is not to be served any more, or None.

    """

    done: Future[T] = field(default_factory=Future)
    waiting: int = 0
    landed: T | None = None
    dropped: str | None = None

    def result(self) -> T:
        """Wait for it; an error is each caller's own copy."""
        error = self.done.exception()
        if error is None:
            return self.done.result()
        raise again(error)


@dataclass(frozen=True)
class _Failure:
    error: BaseException
    until: float
    pause: float


class Flights(Generic[T]):
    """Loads by key."""

    def __init__(self) -> None:
        self.under_way: dict[str, Flight[T]] = {}
        self._failed: dict[tuple[str, str], _Failure] = {}

    def join(self, key: str, name: str) -> tuple[Flight[T], bool]:
        """Return the load of a key, and whether the caller has to do it.

        Failures go by its `name` too: of two that have the same weights, only one may have lost its file.

        Raises
        ------
        Exception
            What the last load of that name raised, while the pause after it lasts.

        """
        if flight := self.under_way.get(key):
            flight.waiting += 1
            return flight, False
        failed = self._failed.get((key, name))
        if failed and time.monotonic() < failed.until:
            raise again(failed.error)
        flight = self.under_way[key] = Flight()
        return flight, True

    def land(self, key: str, name: str, loaded: T) -> None:
        """End a load that went well."""
        self.under_way.pop(key).landed = loaded
        self._failed.pop((key, name), None)

    def fail(self, key: str, name: str, error: Exception, *, pause: bool) -> None:
        """End a load that failed. Who asks for that name within a pause is told the same; each pause is twice the last one."""
        self.under_way.pop(key, None)
        if pause:
            now, before = time.monotonic(), self._failed.get((key, name))
            # One that failed long ago says nothing of today.
            recent = before is not None and now < before.until + _LONGEST_BACK_OFF
            seconds = min(2 * before.pause, _LONGEST_BACK_OFF) if before and recent else FIRST_BACK_OFF
            self._failed[key, name] = _Failure(again(error), now + seconds, seconds)


def again(error: BaseException) -> BaseException:
    """Return an error anew, without the frames that it came through and what they hold."""
    try:
        fresh = copy.copy(error)
    except Exception:  # noqa: BLE001 - an error of another library that can't be made twice
        fresh = RuntimeError(f"{type(error).__name__}: {error}")
    fresh.__cause__ = fresh.__context__ = None
    return fresh.with_traceback(None)
