"""Values as they lie in Redis: each says under which key it was put there, so that none is taken for another one's.

::

    4   magic           "PRTV"
    1   format          1
    1   kind of seal    0: a checksum; 1: made with a secret
    2   reserved        zero
    4   payload length  unsigned, little-endian
    32  seal            blake2b over the key's length (4 bytes, little-endian), the key and the payload
    n   payload

Without a secret a seal finds what was damaged, cut short or put under another key by accident, and nothing that somebody
made on purpose. With one, who does not know it can still remove values, and bring back an older one of the same key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct

from proteus_pipeline.errors import ConfigError

FORMAT = 1
LEAST_SECRET = 16
_MAGIC = b"PRTV"
_HEAD = struct.Struct("<4sBBHI32s")
_SEALED_FOR = b"proteus-seal-1"
_SECRET_FOR = b"proteus-key-1"


class Seal:
    """Seals values, and opens those that are sound.

    Parameters
    ----------
    secret
        Shared by all who use one Redis; None for checksums.

    Raises
    ------
    ConfigError
        When the secret is so short that it could be guessed from one value.

    """

    def __init__(self, secret: str | None = None) -> None:
        if secret is not None and len(secret) < LEAST_SECRET:
            raise ConfigError(
                f"PROTEUS_REDIS_SECRET has {len(secret)} characters", f"use {LEAST_SECRET} or more, by chance"
            )
        raw = secret.encode("utf-8", "surrogateescape") if secret else b""
        self._key = hashlib.blake2b(raw, person=_SECRET_FOR).digest() if secret else b""

    @classmethod
    def of_environment(cls) -> Seal:
        """Return the seal of ``PROTEUS_REDIS_SECRET``; of none where it is empty or not set."""
        return cls(os.environ.get("PROTEUS_REDIS_SECRET") or None)

    @property
    def secret(self) -> bool:
        """Whether there is a secret."""
        return bool(self._key)

    def seal(self, key: bytes, payload: bytes) -> bytes:
        """Return a payload as it is put under a key."""
        digest = self._digest(key, payload)
        return _HEAD.pack(_MAGIC, FORMAT, self.secret, 0, len(payload), digest) + payload

    def open(self, key: bytes, value: bytes) -> memoryview | None:
        """Return the payload of a value that was put under a key; None where it is not what was put there."""
        if len(value) < _HEAD.size:
            return None
        magic, number, kind, reserved, length, digest = _HEAD.unpack_from(value)
        payload = memoryview(value)[_HEAD.size :]
        expected = (_MAGIC, FORMAT, int(self.secret), 0, len(payload))
        if (magic, number, kind, reserved, length) != expected:
            return None
        return payload if hmac.compare_digest(digest, self._digest(key, payload)) else None

    def _digest(self, key: bytes, payload: bytes | memoryview) -> bytes:
        hashed = hashlib.blake2b(len(key).to_bytes(4, "little"), digest_size=32, key=self._key, person=_SEALED_FOR)
        hashed.update(key)
        hashed.update(payload)
        return hashed.digest()
