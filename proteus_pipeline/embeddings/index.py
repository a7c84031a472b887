"""The index of one segment: the file whose appearance makes the segment's entries visible.

::

    8   magic                "PROTEIX" and the format, one byte
    4   header length n      unsigned, little-endian, as all numbers here
    4   reserved             zero
    16  xxh3_128 of header
    n   header               JSON, padded with spaces to a multiple of 8
    56  per entry, sorted by key:
        16 key, 8 offset, 8 nbytes, 4 row, 4 length in residues, 16 content hash
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.identity import digests

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 1
_MAGIC = b"PROTEIX" + bytes([FORMAT])
_HEAD = struct.Struct("<8sII16s")
RECORD = np.dtype(
    [
        ("key_high", ">u8"), ("key_low", ">u8"), ("offset", "<u8"), ("nbytes", "<u8"),
        ("row", "<u4"), ("length", "<u4"), ("content", "V16"),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Attestation:
    """How entries came to be: what decides bits beyond the key, and what they cost.

    Attributes
    ----------
    device_class
        As `proteus_pipeline.models.device.device_class` says it.
    torch
        Its version.
    time
        ISO 8601, UTC.
    seconds, tokens
        Spent on, and in, the segment's entries.

    """

    device_class: str
    torch: str
    time: str
    seconds: float
    tokens: int


@dataclass(frozen=True)
class SegmentHeader:
    """What holds for all entries of a segment."""

    segment: str
    segment_bytes: int
    layout: str
    stored: str
    width: int
    trunk: str
    recipe: dict[str, Any]
    attestation: Attestation
    entries: int
    body: str = ""
    format: int = field(default=FORMAT)


def encode_index(header: SegmentHeader, records: NDArray[np.void]) -> bytes:
    """Return an index file's bytes; the records are sorted by key here."""
    body = np.sort(records, order=("key_high", "key_low")).tobytes()
    text = json.dumps(asdict(header) | {"body": digests.of_bytes(body)}, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return _HEAD.pack(_MAGIC, len(text), 0, bytes.fromhex(digests.of_bytes(text))) + text + body


@dataclass(frozen=True)
class Index:
    """One segment's index, in memory."""

    path: Path
    header: SegmentHeader
    records: NDArray[np.void]
    high: NDArray[np.uint64]

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read and check an index file.

        Raises
        ------
        IntegrityError
            When it is damaged, truncated, or of another format.
        FileNotFoundError
            When it is gone.

        """
        data = path.read_bytes()
        remedy = "its entries are computed again; remove it to silence this"
        if len(data) < _HEAD.size:
            raise IntegrityError(f"{path} is truncated", remedy)
        magic, length, _, checksum = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            if magic[:7] == _MAGIC[:7]:
                raise IntegrityError(f"{path} has format {magic[7]}, and this proteus reads {FORMAT}", "upgrade it")
            raise IntegrityError(f"{path} is no index file", remedy)
        text, body = data[_HEAD.size : _HEAD.size + length], data[_HEAD.size + length :]
        if digests.of_bytes(text) != checksum.hex():
            raise IntegrityError(f"the header of {path} fails its checksum", remedy)
        value = json.loads(text)
        header = SegmentHeader(**value | {"attestation": Attestation(**value["attestation"])})
        if digests.of_bytes(body) != header.body or len(body) != header.entries * RECORD.itemsize:
            raise IntegrityError(f"the body of {path} fails its checksum", remedy)
        records = np.frombuffer(body, dtype=RECORD)
        return cls(path, header, records, records["key_high"].astype(np.uint64))

    def find(self, keys: NDArray[np.void]) -> NDArray[np.int64]:
        """Return the row of each (key_high, key_low) in this index, or -1."""
        rows = np.searchsorted(self.high, keys["high"])
        found = np.full(len(keys), -1, dtype=np.int64)
        # Two keys with the same high half are one in 2^64: a short walk, not a second search.
        for i, start in enumerate(rows):
            row = int(start)
            while row < len(self.high) and self.high[row] == keys["high"][i]:
                if self.records["key_low"][row] == keys["low"][i]:
                    found[i] = row
                    break
                row += 1
        return found


def key_array(keys: list[str]) -> NDArray[np.void]:
    """Return hexadecimal keys as (high, low) pairs of uint64."""
    raw = np.frombuffer(bytes.fromhex("".join(keys)), dtype=[("high", ">u8"), ("low", ">u8")])
    return raw.astype([("high", "<u8"), ("low", "<u8")])
