"""Memory that large reads go to, each array's its own, and used again when nobody looks at it any more.

New memory comes a page of 4 kB at a time, each zeroed: 700 us a MB on a virtual machine (measured), as long as an embedding takes to
be decoded. The C library gave back in between what a read of a bucket had, so that the next one began anew.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEP = 256 << 10
# Of less, the C library's own memory is as quick; of more, it is not worth keeping.
_LEAST, _LARGEST = 128 << 10, 8 << 20
_HUGE = 2 << 20
_IDLE_SECONDS = 60.0


class Memory:
    """Memory for arrays of bytes.

    Parameters
    ----------
    most
        So many bytes that nobody uses are kept: until none was asked for in a minute.

    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[mmap.mmap | memoryview]] = {}
        self.kept = 0
        self._asked, self._watched = 0.0, False

    def lend(self, nbytes: int) -> NDArray[np.uint8]:
        """Return an array, (nbytes,), of whatever bytes; its memory comes back when neither it nor a view of it is left.

        Raises
        ------
        MemoryError
            Where there is none.

        """
        if not _LEAST <= nbytes <= _LARGEST:
            return np.empty(nbytes, np.uint8)
        size = -(-nbytes // _STEP) * _STEP
        with self._lock:
            memory = None
            if free := self._free.get(size):
                memory = free.pop()
                self.kept -= size
            self._asked = time.monotonic()
            watch, self._watched = not self._watched, True
        if watch:
            with suppress(RuntimeError):  # the interpreter is about to end
                threading.Thread(target=self._watch, name="memory", daemon=True).start()
        memory = memory if memory is not None else _new(size)
        # An array of its own each time: numpy's views of views refer to the array that is no view of another, and this is it.
        lent: NDArray[np.uint8] = np.frombuffer(memory, np.uint8, nbytes)
        weakref.finalize(lent, self._come_back, memory, size).atexit = False
        return lent

    def _come_back(self, memory: mmap.mmap | memoryview, size: int) -> None:
        # Whoever looks at memory last may be this thread, in the middle of `lend`: then it is let go.
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self.kept + size <= self._most:
                self._free.setdefault(size, []).append(memory)
                self.kept += size
        finally:
            self._lock.release()

    def _watch(self) -> None:
        while True:
            time.sleep(_IDLE_SECONDS)
            with self._lock:
                if time.monotonic() - self._asked < _IDLE_SECONDS:
                    continue
                free, self._free, self.kept, self._watched = self._free, {}, 0, False
            free.clear()
            return


def _new(size: int) -> mmap.mmap | memoryview:
    if hasattr(mmap, "MAP_PRIVATE"):
        # There may be memory, and no mapping left; numpy says then whether there is.
        with suppress(OSError):
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if size % _HUGE == 0 and hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a system without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
            return memory
    return np.empty(size, np.uint8).data
