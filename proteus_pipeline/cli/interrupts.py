"""Ctrl-C, and a batch system's stop: an interruption that leaves no lock behind.

Python runs a signal's handler between any two steps of the main thread. Within the two methods by which a ``with`` takes and
leaves threading's Condition, an exception would leave its lock taken for ever, and the process with whoever waits for it: a
pool's threads, at its end. Futures, queues and events are made of Conditions.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

# Too early, it is tried again after so many seconds, and so many times: of a plain lock nobody can say whose it is.
_AGAIN_S, _MOST = 0.002, 500
_CHANGING = {threading.Condition.__enter__.__code__, threading.Condition.__exit__.__code__}


class _Interrupt:
    """Raises KeyboardInterrupt in the main thread, as soon as that leaves no lock behind."""

    def __init__(self) -> None:
        self._left = _MOST

    def __call__(self, _: int, frame: FrameType | None) -> None:
        if self._left > 0 and frame is not None and frame.f_code in _CHANGING and _is_taken(frame.f_locals.get("self")):
            self._left -= 1
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            return
        self._left = _MOST
        raise KeyboardInterrupt


def _is_taken(condition: object) -> bool:
    """Say whether a condition's lock is this thread's; of a plain one, which belongs to nobody, whether it is anybody's."""
    return not isinstance(condition, threading.Condition) or condition._is_owned()  # type: ignore[attr-defined]  # noqa: SLF001


def take_interrupts() -> None:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt in the main thread; a SIGINT that is ignored stays so.

    SIGALRM serves to try again.
    """
    interrupt = _Interrupt()
    signal.signal(signal.SIGALRM, interrupt)
    # A cluster's or a container's stop is an interruption too: what is finished is published before the end.
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
