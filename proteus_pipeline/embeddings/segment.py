"""A segment: an immutable, uncompressed zip that is a zarr v3 group of embeddings, and says by itself what it holds.

Per residue, each entry is an array of one chunk, ``KEY/c/0/0``, compressed; and the start tokens' vectors, one a row, are
the array ``start``. Pooled, all entries are the rows of one array, ``pooled``. Beside them, in the order of the rows:
``keys``, ``lengths``, ``contents``, from which a lost index is made again. Chunks end in their crc32c, so any zarr v3
reader opens a segment; this one reads an entry with one pread and is several times faster.
Rows of vectors are not compressed: one is read without its neighbours, and checked by its content hash.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.embeddings.archive import StoredZip
from proteus_pipeline.embeddings.chunks import ROWS_PER_CHUNK, checked, chunk_rows, codec_of, encode_entry, with_crc
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES
from proteus_pipeline.errors import IntegrityError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 1
_ZARR_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "uint16"}
_GROUP = "zarr.json"
_COMPRESSING = 2


@dataclass(frozen=True, slots=True)
class Placed:
    """Where an entry lies: its bytes in the file, and its row among the segment's entries.

    Per residue the bytes are a whole chunk; pooled, a row within one.
    """

    offset: int
    nbytes: int
    row: int


class SegmentWriter:
    """Writes a segment, an entry at a time: what was added is in the file, and not in memory.

    Parameters
    ----------
    path
        A file that does not exist.
    stored
        ``fp32``, ``fp16`` or ``bf16``.
    layout
        ``per_residue``: arrays are (L, D); ``pooled``: (D,).

    """

    def __init__(self, path: Path, stored: str, layout: str) -> None:
        self._stored = stored
        self._layout = layout
        self._file = StoredZip(path)
        # Compression takes most of the time, and leaves the others' lock alone: entries are compressed ahead, two at a time.
        self._ahead: deque[tuple[str, tuple[int, ...], Future[tuple[bytes, int]]]] = deque()
        self._pool = ThreadPoolExecutor(_COMPRESSING, "compress") if layout == "per_residue" else None
        self._rows: list[NDArray[np.generic]] = []
        self._chunk_starts: list[int] = []
        self._placed: list[Placed] = []
        self._keys: list[str] = []
        self._lengths: list[int] = []
        self._contents: list[str] = []

    @property
    def keys(self) -> list[str]:
        """The keys so far, in the order of their rows."""
        return self._keys

    @property
    def lengths(self) -> list[int]:
        """Residues of each entry."""
        return self._lengths

    @property
    def contents(self) -> list[str]:
        """The content hash of each entry."""
        return self._contents

    @property
    def nbytes(self) -> int:
        """The file's bytes so far."""
        return self._file.nbytes

    @property
    def digest(self) -> str:
        """Their digest."""
        return self._file.digest

    def add(
        self,
        key: str,
        array: NDArray[np.generic],
        length: int,
        content: str,
        start: NDArray[np.generic] | None = None,
    ) -> None:
        """Write one entry, in its stored dtype.

        Parameters
        ----------
        key
            32 hexadecimal digits, not added before.
        array
            (L, D) or (D,).
        length
            Residues of its sequence.
        content
            The array's content hash.
        start
            (D,), the start token's vector, per residue; zeros where it is not known.

        """
        if self._pool:
            while len(self._ahead) > _COMPRESSING:
                self._write_chunk()
            self._ahead.append((key, array.shape, self._pool.submit(_encoded, array, self._stored)))
            self._add_row(np.zeros(array.shape[1:], array.dtype) if start is None else start)
        else:
            self._add_row(array)
        self._note(key, length, content)

    def _note(self, key: str, length: int, content: str) -> None:
        self._keys.append(key)
        self._lengths.append(length)
        self._contents.append(content)

    def _write_chunk(self) -> None:
        """Write the oldest of the chunks that are compressed ahead."""
        key, shape, chunk = self._ahead.popleft()
        stored = _ZARR_DTYPES[self._stored]
        self._member(f"{key}/zarr.json", _array(shape, shape, stored, codec_of(NUMPY_DTYPES[self._stored].itemsize)))
        place = self._member(f"{key}/c/0/0", *chunk.result())
        self._placed.append(Placed(place.offset, place.nbytes, len(self._placed)))

    def _add_row(self, row: NDArray[np.generic]) -> None:
        self._rows.append(np.array(row))  # a copy: a view would keep a whole batch alive
        if len(self._rows) == ROWS_PER_CHUNK:
            self._flush_rows()

    def _flush_rows(self) -> None:
        # Chunks are of one size: the last one is filled up, unless it is the only one.
        count = ROWS_PER_CHUNK if self._chunk_starts else len(self._rows)
        rows = np.zeros((count, len(self._rows[0])), dtype=self._rows[0].dtype)
        rows[: len(self._rows)] = self._rows
        place = self._member(f"{self._rows_name}/c/{len(self._chunk_starts)}/0", with_crc(rows.tobytes()))
        self._chunk_starts.append(place.offset)
        if self._layout == "pooled":
            size = rows[0].nbytes
            first = len(self._placed)
            self._placed += [Placed(place.offset + i * size, size, first + i) for i in range(len(self._rows))]
        self._rows = []

    @property
    def _rows_name(self) -> str:
        return "start" if self._layout == "per_residue" else "pooled"

    def finish(self, width: int, attributes: dict[str, Any]) -> tuple[list[Placed], list[int]]:
        """Write what is left, and return where each entry lies, and where each chunk of rows begins.

        Parameters
        ----------
        width
            D.
        attributes
            The group's: format, trunk digest, recipe, attestation.

        """
        while self._ahead:
            self._write_chunk()
        if self._rows:
            self._flush_rows()
        count = len(self._keys)
        rows = _array((count, width), (chunk_rows(count), width), _ZARR_DTYPES[self._stored], None)
        self._member(f"{self._rows_name}/zarr.json", rows)
        digests = {"keys": self._keys, "contents": self._contents}
        columns = {n: np.frombuffer(bytes.fromhex("".join(v)), np.uint8).reshape(-1, 16) for n, v in digests.items()}
        columns["lengths"] = np.array(self._lengths, dtype="<u4")
        for name, column in columns.items():
            self._member(f"{name}/zarr.json", _array(column.shape, column.shape, column.dtype.name, None))
            self._member(f"{name}/c/" + "/".join("0" * column.ndim), with_crc(column.tobytes()))
        self._member(_GROUP, _json({"zarr_format": 3, "node_type": "group", "attributes": attributes}))
        self._stop()
        self._file.finish()
        return self._placed, self._chunk_starts

    def discard(self) -> None:
        """Give the file up; does nothing after `finish`."""
        self._stop()
        self._file.discard()

    def _stop(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _member(self, name: str, data: bytes, crc: int | None = None) -> Placed:
        return Placed(self._file.add(name, data, crc), len(data), 0)


def _encoded(array: NDArray[np.generic], stored: str) -> tuple[bytes, int]:
    """Return an entry's chunk, and the CRC-32 that a zip has of it."""
    chunk = encode_entry(array, stored)
    return chunk, zlib.crc32(chunk)


@dataclass(frozen=True)
class Described:
    """What a segment says of itself.

    Attributes
    ----------
    attributes
        The group's.
    layout, width
        As its index has them.
    keys, lengths, contents
        Of its entries, in the order of their rows.
    placed
        Where each entry lies.
    chunk_starts
        Where each chunk of rows begins.

    """

    attributes: dict[str, Any]
    layout: str
    width: int
    keys: list[str]
    lengths: list[int]
    contents: list[str]
    placed: list[Placed]
    chunk_starts: list[int]


def describe(path: Path) -> Described:
    """Read what a segment says of itself, for the index that it has lost.

    Raises
    ------
    IntegrityError
        When that is damaged.
    OSError
        When the file can't be read.

    """
    damaged = IntegrityError(f"{path} does not say what it holds", "its entries are computed again")
    try:
        with zipfile.ZipFile(path) as file:
            group = json.loads(file.read(_GROUP))
            columns = {name: checked(file.read(f"{name}/c/0/0"), path) for name in ("keys", "contents")}
            lengths = np.frombuffer(checked(file.read("lengths/c/0"), path), dtype="<u4").tolist()
            infos = {i.filename: i for i in file.infolist()}
            layout = "pooled" if "pooled/zarr.json" in infos else "per_residue"
            rows_name = "pooled" if layout == "pooled" else "start"
            array = json.loads(file.read(f"{rows_name}/zarr.json"))
            places = {name: _place(file, i) for name, i in infos.items() if "/c/" in name}
        keys, contents = ([columns[n][i : i + 16].hex() for i in range(0, len(columns[n]), 16)] for n in columns)
        width, itemsize = array["shape"][1], np.dtype(array["data_type"]).itemsize
        starts = [places[f"{rows_name}/c/{n}/0"].offset for n in range(-(-len(keys) // ROWS_PER_CHUNK))]
        if layout == "pooled":
            size = width * itemsize
            placed = [
                Placed(starts[i // ROWS_PER_CHUNK] + i % ROWS_PER_CHUNK * size, size, i) for i in range(len(keys))
            ]
        else:
            chunks = (places[f"{key}/c/0/0"] for key in keys)
            placed = [Placed(p.offset, p.nbytes, i) for i, p in enumerate(chunks)]
        if not len(keys) == len(lengths) == len(contents):
            raise damaged
        return Described(group["attributes"], layout, width, keys, lengths, contents, placed, starts)
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, IndexError, NotImplementedError) as error:
        raise damaged from error


def _place(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Placed:
    """Return where a member's data lies: behind its own header, whose length only it says."""
    assert file.fp is not None  # noqa: S101 - it is open
    file.fp.seek(info.header_offset + 26)
    name, extra = (int.from_bytes(file.fp.read(2), "little") for _ in range(2))
    return Placed(info.header_offset + 30 + name + extra, info.file_size, 0)


def _array(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, codec: dict[str, Any] | None) -> bytes:
    to_bytes = {"name": "bytes", "configuration": {"endian": "little"}} if dtype != "uint8" else {"name": "bytes"}
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if dtype.startswith("float") else 0,
            "codecs": [to_bytes, *([codec] if codec else []), {"name": "crc32c"}],
            "attributes": {},
        }
    )


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
