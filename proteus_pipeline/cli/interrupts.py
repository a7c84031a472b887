"""Ctrl-C, and a batch system's stop: an interruption that leaves no lock behind.

Python runs a signal's handler between any two steps of the main thread. Where those are of the methods by which futures, queues,
events and logging take and leave their locks, an exception would leave one taken for ever, and the process with whoever waits
for it: a pool's threads, at its end.
"""

from __future__ import annotations

import logging
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import _base
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from proteus_pipeline.errors import Terminated

# Too early, it is tried again after so many seconds; and so many times: who waits for a lock that long may wait for ever.
_AGAIN_S, _MOST = 0.002, 500


def _codes(*functions: Any) -> set[CodeType]:
    return {function.__code__ for function in functions}


_CONDITION: Any = threading.Condition  # some of these methods have no public name
_FUTURES: Any = _base
# A `with` takes or leaves a Condition's lock.
_TAKING = _codes(_CONDITION.__enter__, _CONDITION.__exit__)
# Some locks, and not others; a lock that is let go for a wait; an RLock's two methods are C, and whole.
_CHANGING = _codes(
    _FUTURES._AcquireFutures.__enter__,  # noqa: SLF001
    _FUTURES._AcquireFutures.__exit__,  # noqa: SLF001
    _CONDITION._release_save,  # noqa: SLF001
    _CONDITION._acquire_restore,  # noqa: SLF001
    logging.Handler.acquire,
    logging.Handler.release,
    # Of Python 3.11 and 3.12.
    *(f for f in (getattr(logging, name, None) for name in ("_acquireLock", "_releaseLock")) if f),
)
_WAITING = _codes(_CONDITION.wait)
# What is raised while an object goes is printed, and lost.
_LOSING = _codes(weakref.finalize.__call__)


class _Interrupt:
    """Raises KeyboardInterrupt in the main thread as soon as that leaves no lock behind, once for signals that come together."""

    def __init__(self) -> None:
        self._tries = 0
        self._raised: type[KeyboardInterrupt] = KeyboardInterrupt
        self.over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.over or (number == signal.SIGALRM and not self._tries):
            return  # what it was to try again has been raised
        if number == signal.SIGTERM:
            self._raised = Terminated
        if frame is not None and self._tries < _MOST and _leaves_a_lock(frame):
            self._tries += 1
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        raised, self._tries, self._raised = self._raised, 0, KeyboardInterrupt
        raise raised


def _leaves_a_lock(frame: FrameType) -> bool:
    around: FrameType | None = frame
    while around is not None:
        if around.f_code in _LOSING:
            return True
        around = around.f_back
    code = frame.f_code
    if code in _TAKING:
        lock = getattr(frame.f_locals.get("self"), "_lock", None)
        # Of a plain lock nobody can say whose it is.
        taken = getattr(lock, "_is_owned", None) or getattr(lock, "locked", None)
        return taken is None or bool(taken())
    if code in _WAITING:
        # Its lock is let go, and would not be taken again.
        return "waiter" in frame.f_locals and "gotit" not in frame.f_locals
    return code in _CHANGING or code in _OWN


# A second signal, while it is looked where the first one came.
_OWN = _codes(_Interrupt.__call__, _leaves_a_lock)


@contextmanager
def interruptions() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt in the main thread, in the body, and SIGTERM Terminated, which is one; a SIGINT that is
    ignored stays so.

    SIGALRM serves to try again. In another thread, which may not say what a signal does, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt = _Interrupt()
    signals: list[int] = [signal.SIGALRM, signal.SIGTERM]  # a cluster's or a container's stop is an interruption too
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signals.append(signal.SIGINT)
    before: dict[int, Any] = {}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    try:
        for number in signals:
            before[number] = signal.getsignal(number)
            signal.signal(number, interrupt)
        yield
    finally:
        interrupt.over = True  # or one that comes now would leave handlers behind: what was asked for is done
        signal.setitimer(signal.ITIMER_REAL, 0)
        for changed, handler in before.items():
            signal.signal(changed, signal.SIG_DFL if handler is None else handler)
