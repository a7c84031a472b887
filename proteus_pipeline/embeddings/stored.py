"""Stored dtypes, and the content hash over what is stored.

numpy has no bfloat16: its 16 bits are kept as uint16, and widen to fp32 without loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from proteus_pipeline.errors import ProteusError
from proteus_pipeline.identity import digests

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUMPY_DTYPES = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}


def to_stored(array: NDArray[np.float32], stored: str) -> NDArray[np.generic]:
    """Round an fp32 array to its stored dtype, ties to even.

    Raises
    ------
    ProteusError
        When a value does not fit into fp16.

    """
    if stored == "fp32":
        return np.ascontiguousarray(array, dtype="<f4")
    if stored == "fp16":
        with np.errstate(over="ignore"):
            rounded = array.astype("<f2")
        if not np.isfinite(rounded).all() and np.isfinite(array).all():
            raise ProteusError(f"a value of {np.abs(array).max():g} does not fit into fp16", "use embedding.stored=bf16")
        return rounded
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def to_fp32(array: NDArray[np.generic], stored: str) -> NDArray[np.float32]:
    """Widen a stored array to fp32; every stored value is one."""
    if stored == "bf16":
        return (array.astype("<u4") << 16).view("<f4")
    return np.asarray(array, dtype=np.float32)


def content_hash(array: NDArray[np.generic], stored: str) -> str:
    """Return the content hash of a stored array."""
    return digests.of_content(stored, array.shape, memoryview(np.ascontiguousarray(array)).cast("B"))
