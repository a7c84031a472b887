"""A zip file without compression, written from front to back: nothing in it is sought, read again, or kept in memory.

zipfile writes the same bytes; but it takes a member's CRC-32 in the thread that writes, and goes back to each member's header,
for a third of the time that a segment takes (measured, members of 1 MB).
"""

from __future__ import annotations

import os
import struct
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from proteus_pipeline.identity import digests

_LOCAL = struct.Struct("<4s2B4HL2L2H")
_CENTRAL = struct.Struct("<4s4B4HL2L5H2L")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_VERSION, _VERSION_64, _UNIX = 20, 45, 3
_EPOCH = 1 << 5 | 1  # zip's earliest date, 1 January 1980: equal members make equal bytes
_MODE = 0o600 << 16
# Beyond, a number is in a field of 64 bits; where zipfile draws the line.
_LIMIT, _MOST = (1 << 31) - 1, 0xFFFF
# Linux writes what nobody waits for slowly (100 MB took 160 ms more in the end); so a thread waits for every so many bytes.
_FLUSH_BYTES = 8 << 20


class StoredZip:
    """Writes a zip file, a member at a time.

    Parameters
    ----------
    path
        A file that does not exist.

    Raises
    ------
    OSError
        When it does, or can't be written; so do all methods but `discard`.

    """

    def __init__(self, path: Path) -> None:
        self.nbytes = 0
        self._hashed = digests.Hasher()
        self._central: list[bytes] = []
        self._flushed = 0
        self._pool: ThreadPoolExecutor | None = None
        self._flushing: Future[None] | None = None
        self._out = path.open("xb")

    @property
    def digest(self) -> str:
        """The digest of what was written."""
        return self._hashed.hexdigest()

    def add(self, name: str, data: bytes, crc: int | None = None) -> int:
        """Write a member, and return where its data begins.

        Parameters
        ----------
        name
            ASCII.
        data
            Less than 4 GiB.
        crc
            Its CRC-32, where somebody has taken it.

        """
        crc, size, header_at, encoded = zlib.crc32(data) if crc is None else crc, len(data), self.nbytes, name.encode()
        common = (0, 0, 0, _EPOCH, crc, size, size, len(encoded))
        self._write(_LOCAL.pack(b"PK\3\4", _VERSION, 0, *common, 0) + encoded)
        starts = self.nbytes
        self._write(data)
        extra = struct.pack("<HHQ", 1, 8, header_at) if header_at > _LIMIT else b""
        version = _VERSION_64 if extra else _VERSION
        self._central.append(
            _CENTRAL.pack(
                b"PK\1\2", version, _UNIX, version, 0, *common, len(extra), 0, 0, 0, _MODE,
                0xFFFFFFFF if extra else header_at,
            ) + encoded + extra
        )  # fmt: skip
        if self.nbytes - self._flushed >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            self._flush()
        return starts

    def finish(self) -> None:
        """Write the directory of the members, and close the file; it is not all on the disk yet."""
        at, count = self.nbytes, len(self._central)
        self._write(b"".join(self._central))
        size = self.nbytes - at
        if count > _MOST or max(at, size) > _LIMIT:
            ends = self.nbytes
            self._write(_END_64.pack(b"PK\6\6", 44, _VERSION_64, _VERSION_64, 0, 0, count, count, size, at))
            self._write(_LOCATOR.pack(b"PK\6\7", 0, ends, 1))
        count, size, at = min(count, _MOST), min(size, 0xFFFFFFFF), min(at, 0xFFFFFFFF)
        self._write(_END.pack(b"PK\5\6", 0, 0, count, count, size, at, 0))
        try:
            if self._flushing:
                self._flushing.result()  # the system tells of a failure once
        finally:
            self._close()

    def discard(self) -> None:
        """Close the file, finished or not; whatever it has is of no use."""
        with suppress(OSError):  # full
            self._close()

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._hashed.update(data)
        self.nbytes += len(data)

    def _flush(self) -> None:
        if self._flushing:
            self._flushing.result()
        self._out.flush()
        self._flushed = self.nbytes
        self._pool = self._pool or ThreadPoolExecutor(1, "flush")
        self._flushing = self._pool.submit(getattr(os, "fdatasync", os.fsync), self._out.fileno())

    def _close(self) -> None:
        if self._pool:
            self._pool.shutdown()  # or it might flush what is opened next
        self._out.close()
