"""Memory that large reads go to, in huge pages where the system has them, and used again when nobody looks at it any more.

New memory comes a page of 4 kB at a time, each zeroed: 700 us a MB on a virtual machine (measured), as long as an embedding takes to
be decoded. In huge pages it is 130.
"""

from __future__ import annotations

import mmap
import time
import weakref
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


_IDLE_SECONDS = 60.0


class Buffers:
    """Pieces of memory of one size.

    Parameters
    ----------
    nbytes
        Of each; a multiple of 2 MiB, or no huge pages are of use.
    most
        So many that nobody uses are kept: for a minute, and then until another one is lent or comes back.

    """

    def __init__(self, nbytes: int, most: int) -> None:
        self.nbytes = nbytes
        # Whoever looks at memory last may be any thread, at any time: a deque needs no lock, and forgets the oldest by itself.
        self._free: deque[tuple[float, mmap.mmap | memoryview]] = deque(maxlen=most)

    def lend(self) -> NDArray[np.uint8]:
        """Return a piece, (nbytes,), whose bytes may be anything; it comes back when neither it nor a view of it is left."""
        try:
            memory = self._free.pop()[1]
        except IndexError:
            memory = self._new()
        self._let_go()
        # An array of its own each time: numpy's views of views refer to the array that is no view of another, and this is it.
        lent: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        weakref.finalize(lent, self._come_back, memory).atexit = False
        return lent

    def _come_back(self, memory: mmap.mmap | memoryview) -> None:
        self._free.append((time.monotonic(), memory))
        self._let_go()

    def _let_go(self) -> None:
        since = time.monotonic() - _IDLE_SECONDS
        with suppress(IndexError):
            while self._free[0][0] < since:
                self._free.popleft()

    def _new(self) -> mmap.mmap | memoryview:
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return np.empty(self.nbytes, np.uint8).data
        memory = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory
