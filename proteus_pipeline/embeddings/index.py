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

import datetime as dt
import json
import mmap
import re
import struct
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.embeddings.keys import KEY
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES
from proteus_pipeline.errors import FormatError, IntegrityError
from proteus_pipeline.identity import digests

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.stores.store import Store

FORMAT = 1
INDEXES, RUNS = "index", "runs"
LAYOUTS = ("pooled", "per_residue")
_NAME = re.compile(r"\d{1,20}-[0-9a-z]{1,32}\.zip", re.ASCII)
_MAGIC = b"PROTEIX" + bytes([FORMAT])
_HEAD = struct.Struct("<8sII16s")
HEAD_BYTES = _HEAD.size
_RECORD = struct.Struct("<QQQ16sIII4x")
Record = tuple[int, int, int, bytes, int, int, int]
"""The low half of the key, offset, nbytes, content hash, row, length and segment number."""
RECORD = np.dtype(
    [
        ("low", "<u8"), ("offset", "<u8"), ("nbytes", "<u8"), ("content", "V16"),
        ("row", "<u4"), ("length", "<u4"), ("segment", "<u4"), ("reserved", "<u4"),
    ]
)  # fmt: skip
# A larger body is not read for its checksum when it is opened: a wrong record of it leads to bytes that fail theirs, or to
# nothing. `verify` reads it.
CHECKED_BYTES = 64 << 20
# Of a larger file, pages that were touched are given back after about as many bytes, so that memory stays flat.
_FORGET_BYTES = 64 << 20
_LEAST_STEP = 256
# Of no more entries, it is noted which keys there may be: 16 bytes an entry at most.
_MARKED = 1 << 16


def now() -> str:
    """Return the time as attestations have it: ISO 8601, UTC, to the second."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


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
    text = header_text(len(keys), digests.of_bytes(body), segments)
    return encode_head(text) + text + body


def header_text(entries: int, body: str, segments: Sequence[SegmentHeader]) -> bytes:
    """Return an index file's header.

    Parameters
    ----------
    entries
        Their number.
    body
        The checksum of what follows the header.
    segments
        By the number that records have.

    """
    header = _Header(entries, body, [asdict(s) for s in segments])
    text = json.dumps(asdict(header), sort_keys=True).encode()
    return text + b" " * (-len(text) % 8)


def encode_head(text: bytes) -> bytes:
    """Return the `HEAD_BYTES` that stand before a header."""
    return _HEAD.pack(_MAGIC, len(text), 0, bytes.fromhex(digests.of_bytes(text)))


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
                raise FormatError(f"{where} has format {magic[7]}, and this proteus reads {FORMAT}", "upgrade it")
            raise IntegrityError(f"{where} is no index file", remedy)
        start = _HEAD.size + length
        text = bytes(mapped[_HEAD.size : start])
        if digests.of_bytes(text) != checksum.hex():
            raise IntegrityError(f"the header of {where} fails its checksum", remedy)
        try:
            header = _Header(**known_fields(_Header, json.loads(text)))
            segments = tuple(segment_header(value) for value in header.segments)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise IntegrityError(f"{where} says what no index of format {FORMAT} says ({error})", remedy) from error
        if len(mapped) - start != header.entries * (8 + RECORD.itemsize):
            raise IntegrityError(f"{where} is truncated", remedy)
        high = np.frombuffer(mapped, dtype="<u8", count=header.entries, offset=start)
        records = np.frombuffer(mapped, dtype=RECORD, count=header.entries, offset=start + 8 * header.entries)
        index = cls(name, len(mapped), segments, high, records, header.body, mapped, high.data)
        if len(mapped) <= CHECKED_BYTES and not index.sound():
            raise IntegrityError(f"the body of {where} fails its checksum", remedy)
        return index

    @cached_property
    def checked(self) -> bool:
        """Whether the body is what was written: what is too large to be read when it is opened is read once, here."""
        return self.nbytes <= CHECKED_BYTES or self.sound()

    def sound(self) -> bool:
        """Read the whole body, and say whether it is what was written."""
        body = digests.Hasher()
        for part in (self.high.view(np.uint8), self.records.view(np.uint8)):
            for start in range(0, len(part), _FORGET_BYTES):
                body.update(part[start : start + _FORGET_BYTES].data)
                self.forget()
        return body.hexdigest() == self.body

    def locate(self, keys: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]:
        """Return all rows that some keys have: the place of each row's key, the row, and the number of its segment.

        A run has a key as often as its segments do. Keys are best sorted.
        """
        none = np.zeros(0, dtype=np.int64)
        parts = [(none, none, none.astype(np.uint32))]
        # Sorted keys of one step lie in one part of the file, and its pages are given back before the next: looking
        # up 100,000 among 10^7 at once had all 640 MB resident.
        step = max(1, len(keys) * _FORGET_BYTES // max(self.nbytes, 1)) if self._large else len(keys)
        step = max(step, _LEAST_STEP)
        for start in range(0, len(keys), step):
            places, rows = self._rows(keys[start : start + step])
            parts.append((places + start, rows, self.records["segment"][rows]))
            self.forget()
        places, rows, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
        return places, rows, numbers

    def _rows(self, keys: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows = np.searchsorted(self.high, keys["high"]).astype(np.int64)
        places = np.arange(len(keys))
        found = [(places[:0], rows[:0])]
        # Once over all keys, and again over those whose high half the next row has too: more entries of one key, or
        # another key, which is one in 2^64.
        while len(places):
            going = rows < len(self.high)
            places, rows = places[going], rows[going]
            there = self.high[rows] == keys["high"][places]
            places, rows = places[there], rows[there]
            same = self.records["low"][rows] == keys["low"][places]
            found.append((places[same], rows[same]))
            rows = rows + 1
        every, at = (np.concatenate(column) for column in zip(*found, strict=True))
        return every, at

    def find_one(self, high: int, low: int) -> tuple[int, Record] | None:
        """Return the row of one key, and what is there; for one key, in a twentieth of the time that `locate` takes."""
        highs, total, reach = self._highs, len(self.high), self._reach
        if self._marks and not self._marks[high >> self._marked_bits]:
            return None
        # Keys are digests, so evenly spread: a key lies within a few square roots of where its value says.
        first = (high * total >> 64) - reach
        last = first + 2 * reach
        row = bisect_left(highs, high, first, last) if first >= 0 and last <= total else bisect_left(highs, high)
        if row in {first, last}:
            row = bisect_left(highs, high)
        while row < total and highs[row] == high:
            record = self.record(row)
            if record[0] == low:
                return row, record
            row += 1
        return None

    @cached_property
    def _marks(self) -> bytes:
        """Which first bits of keys there are, a byte for each: of keys that are not here, seven of eight or more are told by one look.

        Few keys are in the small, new indexes that are asked first, and a search there waits for memory that is seldom used.
        """
        if len(self.high) > _MARKED:
            return b""
        marks = np.zeros(1 << (64 - self._marked_bits), np.uint8)
        marks[self.high >> np.uint64(self._marked_bits)] = 1
        return marks.tobytes()

    @cached_property
    def _marked_bits(self) -> int:
        return 64 - (8 * len(self.high)).bit_length()

    @cached_property
    def _reach(self) -> int:
        return 2 * isqrt(len(self.high)) + 4

    @cached_property
    def _records_at(self) -> int:
        return self.nbytes - self.records.nbytes

    def record(self, row: int) -> Record:
        """Return what is in a row."""
        record: Record = _RECORD.unpack_from(self._mapped, self._records_at + row * _RECORD.size)
        return record

    def keys(self, rows: NDArray[np.integer[Any]] | slice = slice(None)) -> NDArray[np.void]:
        """Return the keys of some rows, or of all."""
        high = self.high[rows]
        keys = np.empty(len(high), dtype=KEY)
        keys["high"], keys["low"] = high, self.records["low"][rows]
        return keys

    @cached_property
    def _large(self) -> bool:
        return isinstance(self._mapped, mmap.mmap) and self.nbytes > _FORGET_BYTES

    def forget(self) -> None:
        """Give back the pages that were touched of a large file; they stay in the system's cache."""
        if self._large and isinstance(self._mapped, mmap.mmap):
            with suppress(AttributeError, OSError):  # not on every system
                self._mapped.madvise(mmap.MADV_DONTNEED)


def segment_header(value: dict[str, Any]) -> SegmentHeader:
    """Return a segment's header from its JSON; fields that are not known are passed over.

    It may come from anywhere, and its name becomes a path.

    Raises
    ------
    ValueError, TypeError, KeyError, AttributeError
        When it is none.

    """
    a = Attestation(**known_fields(Attestation, value["attestation"]))
    changes = {"attestation": a, "chunk_starts": tuple(value.get("chunk_starts", ()))}
    header = SegmentHeader(**known_fields(SegmentHeader, value) | changes)
    counts = (header.segment_bytes, header.width, header.entries, a.tokens, *header.chunk_starts)
    if not _NAME.fullmatch(header.segment) or header.published >= 1 << 63:
        raise ValueError(f"{header.segment!r} is no segment's name")
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in counts) or not header.width:
        raise ValueError(f"{header.segment} has a number that is none")
    if not isinstance(a.seconds, int | float) or not 0 <= a.seconds < 1e15:
        raise ValueError(f"{header.segment} took {a.seconds} s")
    texts = (header.trunk, header.digest, a.device_class, a.torch, a.time, a.origin)
    if header.layout not in LAYOUTS or header.stored not in NUMPY_DTYPES or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{header.segment} is of no kind that there is")
    header.recipe.keys()
    return header


def known_fields(cls: type, value: dict[str, Any]) -> dict[str, Any]:
    """Return those items of a mapping that a dataclass has fields for: a later writer may have added others."""
    return {f.name: value[f.name] for f in fields(cls) if f.name in value}
