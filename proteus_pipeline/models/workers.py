"""Threads that each compute alone: whatever torch does in one of them, it does with one thread.

So no result can depend on how many threads there are, and none of them waits at the end of every operation for the others:
each takes whole batches, or whole tiles of one, or some columns of a tile's products.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
# Work that comes in steps: the pieces of one don't wait for each other, and those of the next wait for all of them.
Steps = Iterator[Sequence[Callable[[], object]]]


class Crew(Protocol):
    """Who does some pieces of work.

    Attributes
    ----------
    count
        How many pieces are done at once.

    """

    count: int

    def share(self, function: Callable[[T], object], pieces: Iterable[T]) -> None:
        """Do a function on each of the pieces, and return when all are done."""


class Alone:
    """Whoever calls, who does one piece after the other."""

    count = 1

    def share(self, function: Callable[[T], object], pieces: Iterable[T]) -> None:
        """Do the pieces; the first error ends it."""
        for piece in pieces:
            function(piece)


def do_all(crew: Crew, work: Callable[[T], Steps], pieces: Sequence[T]) -> None:
    """Do some pieces of work that come in steps: each by one thread, and those that are too few for that by all, step by step."""
    whole = len(pieces) - len(pieces) % crew.count
    crew.share(lambda piece: _in_turn(work(piece)), pieces[:whole])
    for piece in pieces[whole:]:
        for step in work(piece):
            crew.share(_call, step)


def _in_turn(steps: Steps) -> None:
    for step in steps:
        for piece in step:
            piece()


def _call(piece: Callable[[], object]) -> None:
    piece()


class Workers:
    """Some threads of one torch thread each."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool = pool
        self.count = count

    def share(self, function: Callable[[T], object], pieces: Iterable[T]) -> None:
        """Do the pieces on all threads; the first error is raised once none is left running."""
        left, errors = deque(enumerate(pieces)), dict[int, BaseException]()

        def take() -> None:
            while True:
                try:
                    number, piece = left.popleft()
                except IndexError:
                    return
                try:
                    function(piece)
                except BaseException as error:  # noqa: BLE001 - raised below
                    errors[number] = error

        wait([self._pool.submit(_inferring, take) for _ in range(min(self.count, len(left)))])
        if errors:
            raise errors[min(errors)]

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
