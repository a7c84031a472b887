"""Threads that each compute alone: whatever torch does in one of them, it does with one thread.

So no result can depend on how many threads there are, and none of them waits at the end of every operation for the others:
each takes whole batches, or whole tiles of one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
# Runs a function on each of some pieces of work, and returns when all are done.
Share = Callable[[Callable[[T], None], Iterable[T]], None]


def in_turn(function: Callable[[T], None], pieces: Iterable[T]) -> None:
    """Do one piece after the other, in this thread."""
    for piece in pieces:
        function(piece)


class Workers:
    """Some threads of one torch thread each."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool = pool
        self.count = count

    def share(self, function: Callable[[T], None], pieces: Iterable[T]) -> None:
        """Do the pieces on all threads; the first error is raised once none is left running."""
        futures = [self._pool.submit(_inferring, partial(function, piece)) for piece in pieces]
        errors = [error for error in (future.exception() for future in futures) if error]
        if errors:
            raise errors[0]

    def ahead(self, function: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
        """Yield each piece's result, in order, while the next ones are computed: one more at a time than there are threads."""
        waiting: deque[Future[R]] = deque()
        try:
            for piece in pieces:
                waiting.append(self._pool.submit(_inferring, partial(function, piece)))
                if len(waiting) > self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Threads:
    """How many threads torch has; the calls under way, which each compute with one, have them together.

    What a thread sets is MKL's number in all of them, and what a new thread starts with: were it raised again as one call
    ends, others would multiply with more threads than one. And a thread that began in a call's time has one for ever: what the
    process's number is, only a new thread can tell, while no call is under way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls, self._before = 0, 1

    def count(self) -> int:
        with self._lock:
            return self._before if self._calls else _of_a_new_thread()

    @contextmanager
    def taken(self) -> Iterator[None]:
        import torch

        with self._lock:
            if not self._calls:
                self._before = _of_a_new_thread()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    torch.set_num_threads(self._before)


def _of_a_new_thread() -> int:
    import torch

    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


_threads = _Threads()


def thread_count() -> int:
    """Return how many threads a call may use: torch's number, as it was before the calls that are under way."""
    return _threads.count()


@contextmanager
def workers(count: int) -> Iterator[Workers]:
    """Start `count` threads, and afterwards leave torch with as many of its own as it had."""
    import torch

    with _threads.taken():
        pool = ThreadPoolExecutor(count, "encoder", initializer=partial(torch.set_num_threads, 1))
        try:
            yield Workers(pool, count)
        finally:
            pool.shutdown(cancel_futures=True)


def with_one_thread(function: Callable[[], R]) -> R:
    """Return a function's result, for which torch used one thread."""
    with workers(1) as pool:
        return next(pool.ahead(lambda _: function(), (None,)))


def _inferring(function: Callable[[], R]) -> R:
    import torch

    with torch.inference_mode():  # it is each thread's own
        return function()
