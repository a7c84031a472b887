"""One byte string for each value: what every digest is taken over.

A digest over joined strings can be the same for two values (``"ab" + "c"`` and ``"a" + "bc"``), so values are encoded
with their type and their length. The encoding is injective, and independent of dict order and of platform. It is part
of every stored key: it never changes; a new schema number goes with a new encoding.

======== ==============================================================
type     bytes
======== ==============================================================
None     ``N``
bool     ``T`` or ``F``
int      ``i`` length ``:`` decimal digits
str      ``s`` length ``:`` UTF-8
bytes    ``b`` length ``:`` the bytes
sequence ``l`` number of items ``:`` items
mapping  ``d`` number of items ``:`` key, value, ... sorted by key
======== ==============================================================

Floats are refused: their text depends on who prints it. State a tolerance or a fraction as a string or an integer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def encode(value: object) -> bytes:
    """Return the canonical bytes of a value built from None, bool, int, str, bytes, sequences and str-keyed mappings.

    >>> encode({"b": [1, None], "a": "x"})
    b'd2:s1:as1:xs1:bl2:i1:1N'

    Raises
    ------
    TypeError
        For any other type, floats included.

    """
    out: list[bytes] = []
    _encode(value, out)
    return b"".join(out)


def _encode(value: object, out: list[bytes]) -> None:
    if value is None:
        out.append(b"N")
    elif isinstance(value, bool):
        out.append(b"T" if value else b"F")
    elif isinstance(value, int):
        text = b"%d" % value
        out.append(b"i%d:%b" % (len(text), text))
    elif isinstance(value, str):
        data = value.encode()
        out.append(b"s%d:%b" % (len(data), data))
    elif isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        out.append(b"b%d:%b" % (len(data), data))
    elif isinstance(value, Mapping):
        out.append(b"d%d:" % len(value))
        for key in sorted(value):
            if not isinstance(key, str):
                raise TypeError(f"a mapping's keys must be strings, not {type(key).__name__}")
            _encode(key, out)
            _encode(value[key], out)
    elif isinstance(value, Sequence):
        out.append(b"l%d:" % len(value))
        for item in value:
            _encode(item, out)
    else:
        raise TypeError(f"{type(value).__name__} has no canonical bytes")
