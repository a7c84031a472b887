"""The digests by which weights, sequences, recipes and results are known.

All are xxh3_128 (https://xxhash.com), 16 bytes, written as 32 hexadecimal digits in the canonical big-endian order.
xxh3 finds accidents, not adversaries: weights from outside are checked by SHA-256 before a digest is taken of them, and
a version's record keeps both.

Each digest starts from a kind and a schema number, so that no two kinds of thing share one. ``SCHEMA`` is raised when
any of these definitions changes; tests/identity/golden.json holds what they gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import xxhash

from proteus_pipeline.identity.encoding import encode

Buffer = bytes | bytearray | memoryview

SCHEMA = 1

_PART_BYTES = 1 << 20
Hasher = xxhash.xxh3_128
"""`of_bytes` of what does not fit into memory: ``update``, then ``hexdigest``."""


def of_bytes(data: Buffer) -> str:
    """Return the plain xxh3_128 of some bytes, with no kind: for checksums of files and tensors' bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def of_file(path: Path) -> str:
    """Return `of_bytes` of a file; a part at a time: mapped, all of it would count as this process's memory."""
    hashed = Hasher()
    with path.open("rb") as file:
        while data := file.read(_PART_BYTES):
            hashed.update(data)
    return hashed.hexdigest()


def of_record(kind: str, value: object) -> str:
    """Return the digest of a structured value of some kind.

    >>> of_record("example", {"layer": 6})
    'b6fbe37d5ac074b83eb31ab8bcd0f973'
    """
    return xxhash.xxh3_128_hexdigest(encode(["proteus", kind, SCHEMA, value]))


def before_last(kind: str, *leading: object) -> bytes:
    """Return the canonical bytes of a record of some kind up to its last string: what many digests share.

    The record's value is that string alone, or, where something is `leading`, the list of both.

    >>> of_last(before_last("example", {"layer": 6}), "a") == of_record("example", [{"layer": 6}, "a"])
    True
    """
    value = [*leading, ""] if leading else ""
    return encode(["proteus", kind, SCHEMA, value]).removesuffix(b"s0:")


def of_last(before: bytes, last: str) -> str:
    """Return the digest of a record from its bytes before its last string, and that string."""
    data = last.encode()
    return xxhash.xxh3_128_hexdigest(before + b"s%d:%b" % (len(data), data))


_before = lru_cache(1 << 12)(before_last)


def of_tensor(dtype: str, shape: tuple[int, ...], data: Buffer) -> str:
    """Return a tensor's digest, from its dtype (safetensors' name for it), its shape, and its C-order LE bytes."""
    return of_record("tensor", [dtype, list(shape), of_bytes(data)])


def of_component(name: str, architecture: Mapping[str, object], tensors: Mapping[str, str]) -> str:
    """Return the digest of one component (trunk, lm_head, ...), from its tensors' digests by canonical name."""
    return of_record("component", [name, architecture, tensors])


def of_model(components: Mapping[str, str]) -> str:
    """Return the digest of a whole model, from its components' digests by name."""
    return of_record("model", components)


def of_sequence(sequence: str) -> str:
    """Return the digest of a normalised sequence: upper case, every rule about residues already applied."""
    return of_last(_before("sequence"), sequence)


def of_content(dtype: str, shape: tuple[int, ...], data: Buffer) -> str:
    """Return the content hash of a result: an array's stored dtype, shape and C-order little-endian bytes."""
    return of_last(_before("content", dtype, shape), of_bytes(data))


def hasher_of_content(dtype: str, shape: tuple[int, ...]) -> Callable[[Buffer], bytes]:
    """Return `of_content` for one dtype and shape, to take of many results, as its 16 bytes.

    >>> hasher_of_content("fp32", (2,))(bytes(8)).hex() == of_content("fp32", (2,), bytes(8))
    True
    """
    before = before_last("content", dtype, list(shape)) + b"s32:"
    digest, inner = xxhash.xxh3_128_digest, xxhash.xxh3_128_hexdigest
    return lambda data: digest(before + inner(data).encode())
