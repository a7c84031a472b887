"""Memory that arrays leave: the C library keeps it unless it is told not to."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

# The number that mallopt has for it, and bytes from which an array is a mapping of its own, freed at once.
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 2 << 20


def keep_large_arrays_apart() -> None:
    """Have arrays of 2 MB and more returned to the system as they are freed.

    By itself glibc raises that size with every array that is freed, up to 32 MB, and keeps ever larger ones in pieces.
    """
    if library := _glibc():
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def give_back() -> None:
    """Return to the system what smaller arrays left: some milliseconds."""
    if library := _glibc():
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    """Return the C library, or None where it is not glibc, and has neither of these."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
