"""Counts that outlive their process: one file that all processes of a project append to, and rewrite when it has grown.

An append is one short write under a lock, so that nothing of it is lost when its process is killed, and nothing of others. A
file that has grown is replaced by its sums, under the same lock. Where a file system has no locks, nothing is replaced.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from proteus_pipeline.errors import StorageError
from proteus_pipeline.metrics.lines import Series, increments, to_line, to_lines, totals
from proteus_pipeline.stores.files import TEMPORARY_PREFIX, lock, storage_error, write_atomic
from proteus_pipeline.stores.live import Announcement

NAME = "counts-1.log"
"""The file's name, with the version of its format."""
FOLDER = "metrics"
"""Where it lies, below a project's ``.proteus``."""
COMPACT_BYTES = 1 << 18
# Not through a link, which a clone may bring, and not into a pipe that nobody reads.
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_counting: Callable[[], Path] | None = None
_collected: list[dict[Series, float]] = []
_collecting = threading.Lock()  # several threads of a worker count


class CountsFile:
    """The counts in one folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME

    def add(self, added: Mapping[Series, float]) -> None:
        """Add counts, all or none; when this returns, they outlive this process.

        Raises
        ------
        StorageError
            When they can't be written.

        """
        # An end of line in front: what a full disk cut short takes no other along.
        line = b"\n" + to_line(added)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._turn() as locked:
                descriptor = os.open(self.path, _APPEND, 0o666)
                try:
                    written, size = os.write(descriptor, line), os.fstat(descriptor).st_size
                finally:
                    os.close(descriptor)
                if locked and size > COMPACT_BYTES:
                    with suppress(OSError):  # what was added is there, and the next one tries again
                        self._compact()
        except OSError as error:
            raise storage_error("write", self.path, error) from error
        if written < len(line):
            raise StorageError(f"cannot write {self.path}: the disk is full", "free space there")

    def totals(self) -> dict[Series, float]:
        """Return what all processes have counted; lines that are damaged are passed over.

        Raises
        ------
        StorageError
            When the file is there, and can't be read.

        """
        try:
            return totals(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise storage_error("read", self.path, error) from error

    def _compact(self) -> None:
        """Replace the file by its sums, and remove what killed processes left of that; the caller has the lock."""
        for left in self.folder.glob(f"{TEMPORARY_PREFIX}*{self.path.suffix}"):
            left.unlink(missing_ok=True)
        data = self.path.read_bytes()
        smaller = to_lines(totals(data))
        if len(smaller) < len(data) // 2:
            write_atomic(self.path, smaller)

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Let one process at a time write; yield False where there are no locks."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)  # the folder itself: nothing is left of it
        try:
            yield lock(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def counting(folder: Callable[[], Path]) -> Iterator[None]:
    """Have what this process counts kept in a folder, until the body ends; it is asked for when something is counted."""
    global _counting  # noqa: PLW0603 - as logging's handlers: what is counted in many rooms goes to one place
    before, _counting = _counting, folder
    try:
        yield
    finally:
        _counting = before


@contextmanager
def collecting() -> Iterator[dict[Series, float]]:
    """Have what this process counts collected in a mapping, until the body ends: another process is to `add` it to its own."""
    mine: dict[Series, float] = {}
    with _collecting:
        _collected.append(mine)
    try:
        yield mine
    finally:
        # Whichever ends first, where two threads collect: what both count is in the mapping of either.
        with _collecting:
            _collected[:] = [other for other in _collected if other is not mine]


def add(collected: Mapping[Series, float]) -> None:
    """Count what another process collected, where this process has its counts kept, as `count` does."""
    if collected and _counting is not None:
        with suppress(OSError):
            CountsFile(_counting()).add(collected)


def announcement() -> Announcement | None:
    """Return where this process says what it holds, if it has its counts kept."""
    with suppress(OSError):
        return Announcement(_counting()) if _counting is not None else None
    return None


def count(name: str, value: float = 1, **labels: str) -> None:
    """Count something, where this process has its counts kept; what can't be written is lost, and nothing else.

    Parameters
    ----------
    name
        Of a counter or a histogram in `proteus_pipeline.metrics.catalogue`.
    value
        How much, or what was observed.
    labels
        All that the metric has.

    """
    with _collecting:
        if _collected:
            for series, increment in increments(name, value, labels).items():
                _collected[-1][series] = _collected[-1].get(series, 0) + increment
            return
    if _counting is not None:
        add(increments(name, value, labels))


def count_requests(cache: str, **results: int) -> None:
    """Count what a cache was asked for, by result; a result that nothing had makes no series."""
    for result, number in results.items():
        if number > 0:
            count("proteus_cache_requests_total", number, cache=cache, result=result)
