"""Entries' bytes, from the stores they may lie in, never without their checks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from proteus_pipeline.embeddings.chunks import ROWS_PER_CHUNK, chunk_nbytes, decode_entry, decode_rows
from proteus_pipeline.embeddings.publication import SEGMENTS
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES, content_hash, to_fp32
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.identity import digests
from proteus_pipeline.stores.store import LocalStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.chunks import Buffer
    from proteus_pipeline.embeddings.found import Entry
    from proteus_pipeline.embeddings.index import Index, Record, SegmentHeader
    from proteus_pipeline.stores.store import Store

T = TypeVar("T")
R = TypeVar("R")
B = TypeVar("B", bytes, memoryview)
READING = 2
# A thread keeps the memory that it reads into, where that is no more.
_KEPT_BYTES = 8 << 20
_REPAIR = "run: proteus cache verify --repair"


class _Vectors(NamedTuple):
    """What reading a vector of a segment takes."""

    name: str
    stored: str
    dtype: np.dtype[Any]
    hashed: Callable[[digests.Buffer], bytes]


class Reader:
    """Reads entries from the first store that has their segment.

    Parameters
    ----------
    stores
        The cache's own, then those beneath it.

    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = stores
        self._vectors: dict[str, _Vectors] = {}
        self._kept = threading.local()

    def array(self, entry: Entry) -> NDArray[np.generic]:
        """Return an entry's array in its stored dtype, checked against its checksum and its content hash.

        Raises
        ------
        IntegrityError
            When the bytes are not what was written.
        StorageError
            When they are gone or can't be read.

        """
        return self._first(entry.segment, lambda store, name: self._array(store, name, entry))

    def _first(self, segment: str, read: Callable[[Store, str], R]) -> R:
        """Return what a function reads of a segment from the first store where it is there and sound."""
        name = f"{SEGMENTS}/{segment}"
        failed: StorageError | None = None
        for store in self._stores:
            try:
                return read(store, name)
            except FileNotFoundError:
                continue
            except StorageError as error:
                failed = failed or error  # it may be sound in the cache beneath
        raise failed or StorageError(f"{self._stores[0].location}/{name} is gone", _REPAIR)

    def _array(self, store: Store, name: str, entry: Entry) -> NDArray[np.generic]:
        where = f"{store.location}/{name}"
        if len(entry.shape) == 1:
            data = _bytes(store, name, entry.offset, entry.nbytes)  # a copy: a view might keep a thousand times as much
            whole = len(data) - len(data) % NUMPY_DTYPES[entry.stored].itemsize  # of a damaged index's number of bytes
            array: NDArray[np.generic] = np.frombuffer(data[:whole], dtype=NUMPY_DTYPES[entry.stored])
        else:
            array = decode_entry(self._chunk(store, name, entry), entry.stored, entry.shape, where)
        if content_hash(array, entry.stored) != entry.content:
            raise IntegrityError(f"entry {entry.key} in {where} is not what its index says", "it is computed again")
        return array

    def _chunk(self, store: Store, name: str, entry: Entry) -> Buffer:
        """Return an entry's compressed bytes, which hold until this thread reads the next ones.

        In memory that is used again: new memory takes a system as long to give as decoding takes (measured: 1 ms a MB).
        """
        if entry.nbytes > _KEPT_BYTES or not isinstance(store, LocalStore):
            return _whole(store, name, store.view(name, entry.offset, entry.nbytes), entry.nbytes)
        kept: NDArray[np.uint8] | None = getattr(self._kept, "buffer", None)
        if kept is None or len(kept) < entry.nbytes:
            kept = self._kept.buffer = np.empty(entry.nbytes + entry.nbytes // 4, np.uint8)
        data = kept[: entry.nbytes]
        if not store.read_many(name, [entry.offset], [data.data])[0]:
            raise _truncated(store, name)
        return data

    def start(self, entry: Entry, header: SegmentHeader) -> NDArray[np.generic] | None:
        """Return the start token's vector of a per-residue entry, (D,) in its stored dtype; None where it is not known.

        Raises
        ------
        IntegrityError
            When the bytes are not what was written.
        StorageError
            When they are gone or can't be read.

        """
        if not header.chunk_starts:
            return None
        chunk, row = divmod(entry.row, ROWS_PER_CHUNK)
        nbytes = chunk_nbytes(header.entries, entry.stored, header.width)

        def read(store: Store, name: str) -> NDArray[np.generic]:
            data = _bytes(store, name, header.chunk_starts[chunk], nbytes)
            return decode_rows(data, entry.stored, header.width, f"{store.location}/{name}")

        vector = self._first(entry.segment, read)[row]
        return vector if vector.any() else None  # zeros stand for a vector that nobody had

    def view(self, entry: Entry) -> NDArray[np.generic]:
        """Return a pooled entry's array as it lies in its file, mapped and read-only, checked against its content hash.

        Raises
        ------
        ConfigError
            For an entry per residue: it is compressed.
        IntegrityError
            When the bytes are not what was written.
        StorageError
            When they are gone or can't be mapped.

        """
        if len(entry.shape) != 1:
            raise ConfigError("an embedding per residue is compressed, and can't be mapped", "read it: get")

        def read(store: Store, name: str) -> NDArray[np.generic]:
            mapped = store.map(name)
            if len(mapped) < entry.offset + entry.nbytes:
                raise _truncated(store, name)
            array = np.frombuffer(mapped, NUMPY_DTYPES[entry.stored], entry.shape[0], entry.offset)
            if content_hash(array, entry.stored) != entry.content:
                raise IntegrityError(f"entry {entry.key} in {store.location}/{name} is damaged", _REPAIR)
            return array

        return self._first(entry.segment, read)

    def rows(self, segment: str, offsets: list[int], contents: list[bytes], table: NDArray[np.generic]) -> list[int]:
        """Read vectors of one segment into a table's rows, and return the rows that are not what was written.

        Parameters
        ----------
        segment
            Its file's name.
        offsets, contents
            Where each vector lies, and its content hash's 16 bytes.
        table
            (n, D) in the stored dtype.

        """
        size = table.strides[0]
        flat = table.view(np.uint8).reshape(-1).data
        buffers = [flat[i * size : (i + 1) * size] for i in range(len(offsets))]
        stored = next(name for name, dtype in NUMPY_DTYPES.items() if dtype == table.dtype)
        hashed = digests.hasher_of_content(stored, table.shape[1:])
        for store in self._stores:
            try:
                whole = store.read_many(f"{SEGMENTS}/{segment}", offsets, buffers)
            except FileNotFoundError:
                continue
            pairs = zip(buffers, contents, strict=True)
            return [i for i, (b, content) in enumerate(pairs) if not whole[i] or hashed(b) != content]
        return list(range(len(offsets)))

    def vector(self, index: Index, record: Record) -> NDArray[np.float32] | None:
        """Return the pooled embedding that an index's record is of as fp32, checked; None where that takes more than one look.

        In the first store alone, and without an `Entry`: that took twice as long (measured: 30 us).
        """
        _, offset, nbytes, content, _, _, number = record
        header = index.segments[number]
        known = self._vectors.get(header.segment)
        if known is None:
            if header.layout != "pooled":
                return None
            hashed = digests.hasher_of_content(header.stored, (header.width,))
            known = self._vectors[header.segment] = _Vectors(
                f"{SEGMENTS}/{header.segment}", header.stored, NUMPY_DTYPES[header.stored], hashed
            )
        name, stored, dtype, hashed = known
        try:
            data = self._stores[0].read(name, offset, nbytes)
        except (FileNotFoundError, StorageError):
            return None
        # The hash covers the number of bytes too.
        return to_fp32(np.frombuffer(data, dtype), stored) if hashed(data) == content else None


def _bytes(store: Store, name: str, offset: int, nbytes: int) -> bytes:
    return _whole(store, name, store.read(name, offset, nbytes), nbytes)


def _whole(store: Store, name: str, data: B, nbytes: int) -> B:
    if len(data) != nbytes:
        raise _truncated(store, name)
    return data


def _truncated(store: Store, name: str) -> IntegrityError:
    return IntegrityError(f"{store.location}/{name} is truncated", _REPAIR)


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield a function of each item, in order, while threads work on the next ones: reading and decoding leave Python's lock."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(READING, "reader") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > READING + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
