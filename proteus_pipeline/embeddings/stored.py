"""Stored dtypes, and the content hash over what is stored.

numpy has no bfloat16: its 16 bits are kept as uint16, and widen to fp32 without loss.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.errors import ProteusError
from proteus_pipeline.identity import digests

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
# numpy converts fp16 number by number: 2 ns each to widen, and 3.4 to round. torch has the processor do it, in a tenth of that
# (AMD EPYC), but takes some 40 us to begin. Of no more numbers at once it needs no threads.
_WORTH_TORCH, _AT_ONCE = 32768, 32768
# From here on, fp16 has infinity.
_BEYOND_FP16 = 65520.0


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
        fits = not array.size or -_BEYOND_FP16 < array.min() <= array.max() < _BEYOND_FP16
        if fits:
            large = array.size >= _WORTH_TORCH
            return _by_torch(array, "<f2") if large and _has_torch(array) else array.astype("<f2")
        lost = array[np.isfinite(array) & (np.abs(array) >= _BEYOND_FP16)]
        if lost.size:
            raise ProteusError(f"a value of {lost[0]:g} does not fit into fp16", "use embedding.stored=bf16")
        return array.astype("<f2")  # what is no number may be stored, and is of the same bits with torch and without
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    # Rounding up would carry a NaN's bits into the sign: it would read as a zero.
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0), rounded).astype("<u2")


def to_fp32(array: NDArray[np.generic], stored: str) -> NDArray[np.float32]:
    """Widen a stored array to fp32, always in memory of its own; every stored value is one."""
    if stored == "bf16":
        return (array.astype("<u4") << 16).view("<f4")
    if array.size >= _WORTH_TORCH and stored == "fp16" and _has_torch(array):
        return _by_torch(array, "<f4")
    # A copy, also of fp32: a pooled row is a read-only view of what was read. np.array takes half as long again.
    return array.astype(np.float32, subok=False)


def content_hash(array: NDArray[np.generic], stored: str) -> str:
    """Return the content hash of a stored array."""
    return digests.of_content(stored, array.shape, np.ascontiguousarray(array).data)


def _has_torch(array: NDArray[np.generic]) -> bool:
    # It is not imported for this: a run of hits has none, which would take a second.
    return sys.modules.get("torch") is not None and array.dtype.itemsize <= 4 and array.dtype.isnative


def _by_torch(array: NDArray[np.generic], dtype: str) -> NDArray[Any]:
    """Return what ``array.astype(dtype)`` does, between fp16 and fp32: the same bits, but for those of a NaN."""
    import torch

    whole = np.ascontiguousarray(array)
    converted = np.empty(whole.shape, dtype)
    # torch warns of memory that it may not write to, as that of what was read is: so it is told that it may.
    interface = whole.__array_interface__
    interface["data"] = interface["data"][0], False
    readable = np.asarray(SimpleNamespace(__array_interface__=interface))
    to, of = (torch.from_numpy(array.reshape(-1)) for array in (converted, readable))
    for start in range(0, whole.size, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        to[part].copy_(of[part])
    return converted
