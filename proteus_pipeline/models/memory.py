"""Memory that arrays leave: the C library keeps it unless it is told not to."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

# mallopt's number for bytes from which an array is a mapping of its own, freed at once; and for how many pools threads share.
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 2 << 20
_M_ARENA_MAX = -8


def keep_large_arrays_apart() -> None:
    """Have arrays of 2 MB and more returned to the system as they are freed.

    By itself glibc raises that size with every array that is freed, up to 32 MB, and keeps ever larger ones in pieces. And it
    has eight pools for each core, each of which keeps what its threads freed; here it gets one: 32 threads that compute kept
    60 MB more.
    """
    if library := _glibc():
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        library.mallopt(_M_ARENA_MAX, os.cpu_count() or 1)


def give_back() -> None:
    """Return to the system what smaller arrays left: some milliseconds."""
    if library := _glibc():
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    """Return the C library, or None where it is not glibc, and has neither of these."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
