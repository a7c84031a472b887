"""The chunks of a segment: an entry's compressed array, or rows of vectors, as bytes that end in their crc32c.

blosc decodes most damaged chunks to wrong numbers without a word (over 99% of 1,000 flipped bits), and some crash it (a
segmentation fault within seconds of random damage): the crc32c is not optional, and is compared before blosc sees a byte.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.embeddings.stored import NUMPY_DTYPES
from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.stores.memory import Memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Buffer = bytes | memoryview | NDArray[np.uint8]

ROWS_PER_CHUNK = 32  # what a last chunk may waste is small; a row is read without its chunk
CRC_BYTES = 4
_RESIDUE = 0x48674BC7
# Bytes before and after compression, of the 16 of c-blosc's header (README_CHUNK_FORMAT.rst).
_BLOSC_HEADER = struct.Struct("<4xI4xI")
# blosc's chunk: its format's versions, flags, bytes of a number, of all, of a block, of the chunk; each block's place.
_BLOSC_HEAD = struct.Struct("<BBBBIII")
_BLOSC_SHUFFLED, _BLOSC_ZSTD = 0x01, 4 << 5
# Below, blosc does not split a block; above, its temporary memory would be large, and far above it refuses.
_LEAST_BLOCK, _LARGEST_BLOCK = 4096, 256 << 20
# Numbers of a block, about: blosc decodes several blocks at once.
_NUMBERS = 65536
# Whether a byte of the numbers is worth compressing is tried on so many of them: low ones are noise.
_TRIED, _WORTHWHILE = 32768, 0.98
# As much as is read ahead of a bucket's entries is used again.
_DECODED = Memory(256 << 20)


def encode_entry(array: NDArray[np.generic], stored: str) -> bytes:
    """Return a per-residue entry's chunk: bytes -> blosc -> crc32c."""
    from numcodecs.blosc import Blosc

    array = np.ascontiguousarray(array)
    if _LEAST_BLOCK <= array.nbytes <= _LARGEST_BLOCK:
        return with_crc(*_in_blocks(array))
    c = codec_of(NUMPY_DTYPES[stored].itemsize)["configuration"]
    return with_crc(bytes(Blosc(c["cname"], c["clevel"], Blosc.SHUFFLE, c["blocksize"]).encode(array)))


def _in_blocks(array: NDArray[np.generic]) -> list[Buffer]:
    """Return the parts of a blosc chunk, of a zstd stream for each byte of a block's numbers.

    blosc itself makes one stream of all bytes, where zstd codes the high ones, which compress, together with low ones,
    which don't, and tries the low ones in vain: of the 8M model's hidden states in fp16, 87.2% remain, and 86.8% this way.
    """
    from numcodecs import zstd

    size = array.dtype.itemsize
    words = array.reshape(-1).view(f"<u{size}")
    blocks = words.reshape(_blocks(len(words)), -1)
    shifted = np.empty_like(blocks[0])
    plain = [False] * size
    parts: list[Buffer] = []
    starts: list[int] = []
    total = _BLOSC_HEAD.size + 4 * len(blocks)
    for block in blocks:
        starts.append(total)
        for n in range(size):
            # One byte of all numbers, as blosc's shuffle lays them.
            plane = (np.right_shift(block, 8 * n, out=shifted) if n else block).astype(np.uint8)
            if len(starts) == 1:
                some = plane[:_TRIED]
                plain[n] = len(zstd.compress(some, 1)) >= _WORTHWHILE * len(some)
            stream: Buffer = plane
            if not plain[n]:
                packed = zstd.compress(plane, 1)
                stream = packed if len(packed) < len(plane) else plane  # as long as the plane means: the plane itself
            parts += [struct.pack("<i", len(stream)), stream]
            total += 4 + len(stream)
    head = _BLOSC_HEAD.pack(2, 1, _BLOSC_SHUFFLED | _BLOSC_ZSTD, size, array.nbytes, blocks[0].nbytes, total)
    return [head, struct.pack(f"<{len(starts)}I", *starts), *parts]


def _blocks(numbers: int) -> int:
    """Return into how many equal blocks so many numbers go: blosc does not split one that is shorter than the others."""
    blocks = max(1, round(numbers / _NUMBERS))
    while numbers % blocks:
        blocks -= 1
    return blocks


def decode_entry(data: Buffer, stored: str, shape: tuple[int, ...], origin: str) -> NDArray[np.generic]:
    """Return a chunk's array in its stored dtype, after its checksum.

    Raises
    ------
    IntegrityError
        When the bytes are not what was written.

    """
    body = checked(data, origin)
    wanted = shape[0] * shape[1] * NUMPY_DTYPES[stored].itemsize
    try:
        # Its own header first: blosc believes it.
        nbytes, cbytes = _BLOSC_HEADER.unpack_from(body) if len(body) >= _BLOSC_HEADER.size else (0, 0)
        if (nbytes, cbytes) == (wanted, len(body)):
            array: NDArray[np.generic] = _decompressed(body, wanted).view(NUMPY_DTYPES[stored])
            return array.reshape(shape)
    except (
        RuntimeError,
        ValueError,
        SystemError,
    ) as error:  # sound bytes, and no chunk of this dtype: another segment's
        raise IntegrityError(f"a chunk of {origin} is not what its index says", "run it again") from error
    raise IntegrityError(f"a chunk of {origin} is not what its index says: {shape} in {stored}", "run it again")


def _decompressed(body: memoryview, nbytes: int) -> NDArray[np.uint8]:
    """Return what is in a blosc chunk; from the main thread by several at once, which is numcodecs' own way."""
    from numcodecs import blosc

    out = _DECODED.lend(nbytes)
    if threading.current_thread() is not threading.main_thread():
        blosc.decompress(body, out)  # by this thread alone
    else:
        # zarr turns that way off for the whole process, since it reads from threads of its own: those use none either way.
        before, blosc.use_threads = blosc.use_threads, None
        try:
            blosc.decompress(body, out)
        finally:
            blosc.use_threads = before
    out.flags.writeable = False
    return out


def decode_rows(data: bytes, stored: str, width: int, origin: str) -> NDArray[np.generic]:
    """Return a chunk's (rows, D) rows, after its checksum.

    Raises
    ------
    IntegrityError
        When the bytes are not what was written.

    """
    return np.frombuffer(checked(data, origin), dtype=NUMPY_DTYPES[stored]).reshape(-1, width)


def chunk_rows(entries: int) -> int:
    """Return the rows of a chunk, in a segment of so many entries."""
    return min(entries, ROWS_PER_CHUNK)


def chunk_nbytes(entries: int, stored: str, width: int) -> int:
    """Return the bytes of a chunk of rows in the file, its checksum included."""
    return chunk_rows(entries) * width * NUMPY_DTYPES[stored].itemsize + CRC_BYTES


def with_crc(*parts: Buffer) -> bytes:
    """Return the parts of a chunk with their crc32c behind them, as zarr's codec has it."""
    import google_crc32c

    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, part)
    ended: list[Any] = [*parts, crc.to_bytes(CRC_BYTES, "little")]
    return b"".join(ended)


def checked(data: Buffer, origin: object) -> memoryview:
    """Return a chunk's bytes without their checksum, having compared it; `IntegrityError` where it is another."""
    import google_crc32c

    # Of bytes that end in their own crc32c, the crc32c is always the same: nothing is copied to leave its four bytes out.
    # As an array, since google_crc32c takes no memoryview.
    if len(data) <= CRC_BYTES or google_crc32c.value(np.frombuffer(data, np.uint8)) != _RESIDUE:
        raise IntegrityError(f"a chunk of {origin} fails its checksum", "proteus run computes it again")
    view: Any = data  # an array is a buffer too, which its type does not say
    return memoryview(view)[:-CRC_BYTES]


def codec_of(typesize: int) -> dict[str, Any]:
    """Return how zarr names the compression of numbers of so many bytes."""
    # The block size is that of chunks beyond _LARGEST_BLOCK alone: zstd's own blocks then hold bytes of one kind. blosc's
    # automatic size compresses these 8% less well, and at half the speed (measured, width 1280).
    options = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": typesize}
    return {"name": "blosc", "configuration": options | {"blocksize": 131072 * typesize}}
