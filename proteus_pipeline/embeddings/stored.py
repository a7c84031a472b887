"""Stored dtypes, and the content hash over what is stored.

numpy has no bfloat16: its 16 bits are kept as uint16, and widen to fp32 without loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.errors import ProteusError
from proteus_pipeline.identity import digests

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}


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
        lost = np.isinf(rounded) & np.isfinite(array)
        if lost.any():
            raise ProteusError(f"a value of {array[lost][0]:g} does not fit into fp16", "use embedding.stored=bf16")
        return rounded
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    # Rounding up would carry a NaN's bits into the sign: it would read as a zero.
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0), rounded).astype("<u2")


def to_fp32(array: NDArray[np.generic], stored: str) -> NDArray[np.float32]:
    """Widen a stored array to fp32, always in memory of its own; every stored value is one."""
    if stored == "bf16":
        return (array.astype("<u4") << 16).view("<f4")
    # A copy, also of fp32: a pooled row is a read-only view of what was read. np.array takes half as long again.
    return array.astype(np.float32, subok=False)


def content_hash(array: NDArray[np.generic], stored: str) -> str:
    """Return the content hash of a stored array."""
    return digests.of_content(stored, array.shape, np.ascontiguousarray(array).data)
