"""Embedding keys, 32 hexadecimal digits, as an index has them: two halves of 64 bits."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
_HALVES = struct.Struct(">QQ")
_KEY_DIGITS = 32


def key_array(keys: Sequence[str]) -> NDArray[np.void]:
    """Return hexadecimal keys as (high, low) pairs of uint64.

    Raises
    ------
    ValueError
        When one is not 32 hexadecimal digits.

    """
    data = b""
    with suppress(ValueError):
        data = bytes.fromhex("".join(keys))
    if 2 * len(data) != _KEY_DIGITS * len(keys) or set(map(len, keys)) - {_KEY_DIGITS}:
        for key in keys:
            key_halves(key)  # which says it of the first that is none
    return np.frombuffer(data, dtype=[("high", ">u8"), ("low", ">u8")]).astype(KEY)


def key_halves(key: str) -> tuple[int, int]:
    """Return one key as `key_array` does many; `ValueError` when it is not 32 hexadecimal digits."""
    try:
        if len(key) == _KEY_DIGITS:
            high, low = _HALVES.unpack(bytes.fromhex(key))
            return high, low
    except (ValueError, struct.error):
        pass
    raise ValueError(f"{key!r} is no embedding key: it has 32 hexadecimal digits")


def key_strings(keys: NDArray[np.void]) -> list[str]:
    """Return (high, low) pairs as hexadecimal keys."""
    text = keys.astype([("high", ">u8"), ("low", ">u8")]).tobytes().hex()
    return [text[i : i + 32] for i in range(0, len(text), 32)]
