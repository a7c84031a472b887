"""What makes entries visible: the index of one segment, or a run, the merged index of many. One format for both.

::

    8   magic                "PROTEIX" and the format, one byte
    4   header length n      unsigned, little-endian, as all numbers here
    4   reserved             zero
    16  xxh3_128 of header
    n   header               JSON, padded with spaces to a multiple of 8
    8   per entry            the high half of its key; all of them, sorted
    56  per entry, in the same order:
        8 low half of key, 8 offset, 8 nbytes, 16 content hash, 4 row, 4 length in residues, 4 number of its segment, 4 zero

The high halves lie together, so that a search among ten million keys touches 80 MB.
"""

from __future__ import annotations

import json
import mmap
import struct
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.identity import digests

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.stores.store import Store

FORMAT = 1
_MAGIC = b"PROTEIX" + bytes([FORMAT])
_HEAD = struct.Struct("<8sII16s")
_LOW = struct.Struct("<Q")
_RECORD = struct.Struct("<8xQQ16sIII4x")
RECORD = np.dtype(
    [
        ("low", "<u8"), ("offset", "<u8"), ("nbytes", "<u8"), ("content", "V16"),
        ("row", "<u4"), ("length", "<u4"), ("segment", "<u4"), ("reserved", "<u4"),
    ]
)  # fmt: skip
KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
# A larger body is not read for its checksum when it is opened: a wrong record of it leads to bytes that fail theirs, or to
# nothing. `verify` reads it.
CHECKED_BYTES = 64 << 20
# Pages that a large look-up touched are given back, so that memory stays flat; they stay in the system's cache.
_FORGET_BYTES = 64 << 20
_PAGE = 4096


@dataclass(frozen=True)
class Attestation:
    """How entries came to be: what decides bits beyond the key, and what they cost.

    Attributes
    ----------
    device_class
        As `proteus_pipeline.models.device.device_class` says it; ``unattested`` for what was imported.
    torch
        Its version.
    time
        ISO 8601, UTC.
    seconds, tokens
        Spent on, and in, the segment's entries.
    origin
        ``computed``, ``derived`` or ``imported``.

    """

    device_class: str
    torch: str
    time: str
    seconds: float
    tokens: int
    origin: str = "computed"


@dataclass(frozen=True)
class SegmentHeader:
    """What holds for all entries of a segment.

    Attributes
    ----------
    segment, segment_bytes, digest
        Its file's name, size and xxh3_128.
    layout
        ``per_residue`` or ``pooled``.
    stored, width
        The dtype and D of its arrays.
    trunk, recipe
        What its entries' keys were made from.
    attestation
        How they came to be.
    entries
        Their number.
    chunk_starts
        Per residue, where each chunk of start tokens' vectors begins.

    """

    segment: str
    segment_bytes: int
    layout: str
    stored: str
    width: int
    trunk: str
    recipe: dict[str, Any]
    attestation: Attestation
    entries: int
    chunk_starts: tuple[int, ...] = ()
    digest: str = ""

    @property
    def published(self) -> int:
        """When its name was made, nanoseconds."""
        return int(self.segment.partition("-")[0])


@dataclass(frozen=True)
class _Header:
    entries: int
    body: str
    segments: list[dict[str, Any]]
    format: int = field(default=FORMAT)


def encode_index(segments: Sequence[SegmentHeader], keys: NDArray[np.void], records: NDArray[np.void]) -> bytes:
    """Return an index file's bytes; entries are sorted by key here, and given its low half."""
    order = np.lexsort((keys["low"], keys["high"]))
    ordered = records[order]
    ordered["low"] = keys["low"][order]
    body = keys["high"][order].astype("<u8").tobytes() + ordered.tobytes()
    header = _Header(len(keys), digests.of_bytes(body), [asdict(s) for s in segments])
    text = json.dumps(asdict(header), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return _HEAD.pack(_MAGIC, len(text), 0, bytes.fromhex(digests.of_bytes(text))) + text + body


@dataclass(frozen=True)
class Index:
    """An index file, mapped.

    Attributes
    ----------
    name
        ``index/...`` or ``runs/...``, in its store.
    nbytes
        Of the file.
    segments
        By the number that records have.
    high, records
        Of the entries, sorted by key.
    body
        The checksum of both.

    """

    name: str
    nbytes: int
    segments: tuple[SegmentHeader, ...]
    high: NDArray[np.uint64]
    records: NDArray[np.void]
    body: str
    _mapped: mmap.mmap | memoryview
    _highs: memoryview

    @classmethod
    def read(cls, store: Store, name: str) -> Index:
        """Open and check an index file.

        Raises
        ------
        IntegrityError
            When it is damaged, truncated, or of another format.
        FileNotFoundError
            When it is gone.

        """
        where = f"{store.location}/{name}"
        remedy = "run: proteus cache verify --repair"
        mapped = store.map(name)
        if len(mapped) < _HEAD.size:
            raise IntegrityError(f"{where} is truncated", remedy)
        magic, length, _, checksum = _HEAD.unpack_from(mapped)
        if magic != _MAGIC:
            if magic[:7] == _MAGIC[:7]:
                raise IntegrityError(f"{where} has format {magic[7]}, and this proteus reads {FORMAT}", "upgrade it")
            raise IntegrityError(f"{where} is no index file", remedy)
        start = _HEAD.size + length
        text = bytes(mapped[_HEAD.size : start])
        if digests.of_bytes(text) != checksum.hex():
            raise IntegrityError(f"the header of {where} fails its checksum", remedy)
        header = _Header(**json.loads(text))
        if len(mapped) - start != header.entries * (8 + RECORD.itemsize):
            raise IntegrityError(f"{where} is truncated", remedy)
        high = np.frombuffer(mapped, dtype="<u8", count=header.entries, offset=start)
        records = np.frombuffer(mapped, dtype=RECORD, count=header.entries, offset=start + 8 * header.entries)
        segments = tuple(_segment_header(value) for value in header.segments)
        index = cls(name, len(mapped), segments, high, records, header.body, mapped, high.data)
        if len(mapped) <= CHECKED_BYTES and not index.sound():
            raise IntegrityError(f"the body of {where} fails its checksum", remedy)
        return index

    def sound(self) -> bool:
        """Read the whole body, and say whether it is what was written."""
        view = memoryview(self._mapped)
        found = digests.of_bytes(view[len(view) - self.high.nbytes - self.records.nbytes :])
        view.release()
        self._forget()
        return found == self.body

    def find(self, keys: NDArray[np.void]) -> NDArray[np.int64]:
        """Return the row of each key in this index, or -1; keys are best sorted."""
        wanted = keys["high"]
        rows = np.searchsorted(self.high, wanted).astype(np.int64)
        inside = np.minimum(rows, len(self.high) - 1)
        there = (rows < len(self.high)) & (self.high[inside] == wanted)
        found = np.full(len(keys), -1, dtype=np.int64)
        places = np.flatnonzero(there)
        same = self.records["low"][rows[places]] == keys["low"][places]
        found[places[same]] = rows[places[same]]
        # Two keys with the same high half are one in 2^64: a walk over those alone.
        for place in places[~same]:
            row = int(rows[place]) + 1
            while row < len(self.high) and self.high[row] == wanted[place]:
                if self.records["low"][row] == keys["low"][place]:
                    found[place] = row
                    break
                row += 1
        if len(places) * _PAGE > _FORGET_BYTES:
            self._forget()
        return found

    def find_one(self, high: int, low: int) -> int:
        """Return the row of one key, or -1; for one key, in a twentieth of the time that `find` takes."""
        highs, total = self._highs, len(self._highs)
        # Keys are digests, so evenly spread: a key lies within a few square roots of where its value says.
        about, reach = (high * total) >> 64, 4 * isqrt(total) + 4
        first, last = max(0, about - reach), min(total, about + reach)
        row = bisect_left(highs, high, first, last)
        if (row == first and first) or (row == last and last < total):
            row = bisect_left(highs, high)
        while row < len(highs) and highs[row] == high:
            if _LOW.unpack_from(self._mapped, self._records_at + row * RECORD.itemsize)[0] == low:
                return row
            row += 1
        return -1

    @cached_property
    def _records_at(self) -> int:
        return self.nbytes - self.records.nbytes

    def record(self, row: int) -> tuple[int, int, bytes, int, int, int]:
        """Return a row's offset, nbytes, content hash, row, length and segment number."""
        offset, nbytes, content, place, length, segment = _RECORD.unpack_from(
            self._mapped, self._records_at + row * RECORD.itemsize
        )
        return offset, nbytes, content, place, length, segment

    def keys(self, rows: NDArray[np.integer[Any]] | slice = slice(None)) -> NDArray[np.void]:
        """Return the keys of some rows, or of all."""
        high = self.high[rows]
        keys = np.empty(len(high), dtype=KEY)
        keys["high"], keys["low"] = high, self.records["low"][rows]
        return keys

    def _forget(self) -> None:
        if isinstance(self._mapped, mmap.mmap) and len(self._mapped) > _FORGET_BYTES:
            with suppress(AttributeError, OSError):  # not on every system
                self._mapped.madvise(mmap.MADV_DONTNEED)


def _segment_header(value: dict[str, Any]) -> SegmentHeader:
    changes = {"attestation": Attestation(**value["attestation"]), "chunk_starts": tuple(value["chunk_starts"])}
    return SegmentHeader(**value | changes)


def key_array(keys: Sequence[str]) -> NDArray[np.void]:
    """Return hexadecimal keys as (high, low) pairs of uint64."""
    raw = np.frombuffer(bytes.fromhex("".join(keys)), dtype=[("high", ">u8"), ("low", ">u8")])
    return raw.astype(KEY)


def key_strings(keys: NDArray[np.void]) -> list[str]:
    """Return (high, low) pairs as hexadecimal keys."""
    text = keys.astype([("high", ">u8"), ("low", ">u8")]).tobytes().hex()
    return [text[i : i + 32] for i in range(0, len(text), 32)]
