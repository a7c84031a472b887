"""The digests by which weights, sequences, recipes and results are known.

All are xxh3_128 (https://xxhash.com), 16 bytes, written as 32 hexadecimal digits in the canonical big-endian order.
xxh3 finds accidents, not adversaries: weights from outside are checked by SHA-256 before a digest is taken of them, and
a version's record keeps both.

Each digest starts from a kind and a schema number, so that no two kinds of thing share one. ``SCHEMA`` is raised when
any of these definitions changes; tests/identity/golden.json holds what they gave.
"""

from __future__ import annotations

from collections.abc import Mapping

import xxhash

from proteus_pipeline.identity.encoding import encode

Buffer = bytes | bytearray | memoryview

SCHEMA = 1


def of_bytes(data: Buffer) -> str:
    """Return the plain xxh3_128 of some bytes, with no kind: for checksums of files and tensors' bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def of_record(kind: str, value: object) -> str:
    """Return the digest of a structured value of some kind.

    >>> of_record("example", {"layer": 6})
    'b6fbe37d5ac074b83eb31ab8bcd0f973'
    """
    return xxhash.xxh3_128_hexdigest(encode(["proteus", kind, SCHEMA, value]))


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
    return of_record("sequence", sequence)


def of_content(dtype: str, shape: tuple[int, ...], data: Buffer) -> str:
    """Return the content hash of a result: an array's stored dtype, shape and C-order little-endian bytes."""
    return of_record("content", [dtype, list(shape), of_bytes(data)])
