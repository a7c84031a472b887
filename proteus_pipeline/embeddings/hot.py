"""Pooled vectors in Redis: what one machine computed, another one fetches before it would compute it too.

Never per residue, and never the only copy: what is there was published in somebody's cache, and is forgotten after a week. What
is fetched becomes entries of the local cache, as computed where it was computed.

A vector lies under its trunk's generation and its embedding key. An invalidation begins a new generation, so that nobody finds
older vectors any more; a run puts what it computes under the generation that it found before it computed.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import math
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from proteus_pipeline.embeddings.index import Attestation, known_fields
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES, to_fp32
from proteus_pipeline.stores.counts import count_requests
from proteus_pipeline.stores.redis import RedisClient

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.events import CacheEvent
    from proteus_pipeline.embeddings.index import SegmentHeader
    from proteus_pipeline.embeddings.recipe import Recipe

KIND = "vector"
TTL_S = 7 * 86400.0
# Fetched and published at a time.
PORTION = 4096
# Clocks of machines differ; a time beyond that is damage, and would outlast every invalidation.
_AHEAD_NS = 86400 * 10**9
_LENGTH = struct.Struct("<H")
_log = logging.getLogger(__name__)


class Offered(NamedTuple):
    """A vector that was published here: (D,) in its stored dtype, and the residues of its sequence."""

    key: str
    array: NDArray[np.generic]
    length: int


@dataclass(frozen=True)
class Fetched:
    """A vector from Redis, and what was said of it.

    Attributes
    ----------
    key, array, length
        As in `Offered`.
    published
        When its segment was named where it was computed, nanoseconds since 1970.
    attestation
        How it came to be, with its own share of the seconds and tokens.

    """

    key: str
    array: NDArray[np.generic]
    length: int
    published: int
    attestation: Attestation


class HotTier:
    """The vectors that a Redis holds, for one cache.

    Parameters
    ----------
    client
        Of the Redis.
    only_mine
        Returns the device class whose vectors alone are taken; None for all.

    """

    def __init__(self, client: RedisClient, only_mine: Callable[[], str] | None = None) -> None:
        self.client = client
        self.only_mine = only_mine

    def run(self, trunk: str, recipe: Recipe) -> HotRun | None:
        """Begin a run's look-ups and offers; None for a recipe whose arrays have no place there."""
        return None if recipe.pooling == "per_residue" else HotRun(self, trunk, recipe)

    def invalidate(self, trunk: str) -> None:
        """Let nobody find the vectors of a trunk that are there now; say so where Redis can't be told."""
        if self.client.advance(_generation(trunk)) is None:
            _log.warning(
                "Redis at %s was not told of the invalidation: while it keeps what it had, other machines may be given it; "
                "invalidate again when it answers",
                self.client.place,
            )


class HotRun:
    """One run's look-ups and offers.

    Attributes
    ----------
    counts
        ``hits``; ``rejected``: was not what was put there; ``stale``: hidden by an invalidation that is known here;
        ``foreign``: of another device class, where that is not accepted; ``put``.

    """

    def __init__(self, tier: HotTier, trunk: str, recipe: Recipe) -> None:
        self._tier, self._trunk, self._recipe = tier, trunk, recipe
        self._known_generation: str | None = None
        self._asked = False
        self.counts: Counter[str] = Counter()

    def _generation(self) -> str | None:
        """Return the trunk's generation as it was when this run first asked; None where it could not be asked."""
        if not self._asked:
            self._asked = True
            self._known_generation = self._tier.client.generation(_generation(self._trunk))
        return self._known_generation

    def begin(self) -> None:
        """Ask for the generation that this run's vectors go under, before any of them is computed."""
        self._generation()

    def fetch(self, wanted: Mapping[str, str], events: Iterable[CacheEvent]) -> list[Fetched]:
        """Return the sound and valid vectors that Redis has of some sequences.

        Parameters
        ----------
        wanted
            Normalised sequences by embedding key.
        events
            Those that hold in the cache they are for.

        """
        generation = self._generation()
        if generation is None:
            count_requests("redis", failed=len(wanted))
            return []
        names = {f"{generation}:{key}": key for key in wanted}
        client, before = self._tier.client, self.counts.copy()
        rejected, unanswered = client.rejected, client.unanswered
        values = client.get_many(KIND, list(names))
        self.counts["rejected"] += client.rejected - rejected
        unanswered = client.unanswered - unanswered
        hidden = [e.time for e in events if e.invalidates(self._trunk, self._recipe.described())]
        taken = list(self._taken(values, names, wanted, max(hidden, default=-1)))
        refused = sum(self.counts[of] - before[of] for of in ("rejected", "stale", "foreign"))
        missed = len(wanted) - len(taken) - refused - unanswered
        count_requests("redis", hit=len(taken), miss=missed, refused=refused, failed=unanswered)
        return taken

    def _taken(
        self, values: Mapping[str, memoryview], names: Mapping[str, str], wanted: Mapping[str, str], hidden: int
    ) -> Iterator[Fetched]:
        mine = self._tier.only_mine() if values and self._tier.only_mine else None
        for name, payload in values.items():
            key = names[name]
            fetched = decode(key, payload, self._trunk, self._recipe, len(wanted[key]))
            if fetched is None:
                self.counts["rejected"] += 1
            elif fetched.published <= hidden:
                self.counts["stale"] += 1
            elif mine is not None and fetched.attestation.device_class != mine:
                self.counts["foreign"] += 1
            else:
                self.counts["hits"] += 1
                yield fetched

    def offer(self, header: SegmentHeader, vectors: Iterable[Offered]) -> None:
        """Put vectors there that were computed by this run, and published as a segment."""
        generation = self._generation()
        if generation is not None:
            values = {f"{generation}:{v.key}": encode(v, header, self._recipe) for v in vectors}
            self.counts["put"] += self._tier.client.put_many(KIND, values, ttl=TTL_S)


def encode(vector: Offered, header: SegmentHeader, recipe: Recipe) -> bytes:
    """Return a vector as it is put: the length of what is said of it (2 bytes), that as JSON, and its numbers."""
    a = header.attestation
    said = {
        "trunk": header.trunk,
        "recipe": recipe.identity(vector.length),
        "length": vector.length,
        "published": header.published,
        "device_class": a.device_class,
        "torch": a.torch,
        "time": a.time,
        "origin": a.origin,
        "seconds": round(a.seconds * (vector.length + 2) / a.tokens, 6) if a.tokens else 0.0,
        "tokens": vector.length + 2,
    }
    text = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    return _LENGTH.pack(len(text)) + text + np.ascontiguousarray(vector.array).tobytes()


def decode(key: str, payload: bytes | memoryview, trunk: str, recipe: Recipe, length: int) -> Fetched | None:
    """Return what was put under a key, or None where it is no vector of these weights, this recipe and a sequence so long.

    A seal that was made without a secret is anybody's: so nothing here may raise, or reach a name or a size, for what is said.
    """
    try:
        (size,) = _LENGTH.unpack_from(payload)
        said = json.loads(bytes(payload[_LENGTH.size : _LENGTH.size + size]))
        dtype = NUMPY_DTYPES[recipe.stored]
        array = np.frombuffer(payload, dtype=dtype, offset=_LENGTH.size + size)
        of = (said["trunk"], said["recipe"], said["length"])
        attestation = Attestation(**known_fields(Attestation, said))
        published = said["published"]
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        return None
    if (
        of != (trunk, recipe.identity(length), length)
        or not len(array)
        or not _credible(attestation, published, length)
    ):
        return None
    if not np.isfinite(to_fp32(array, recipe.stored)).all():
        return None
    return Fetched(key, array, length, published, attestation)


def _credible(a: Attestation, published: Any, length: int) -> bool:
    """Say whether an attestation's fields are what they should be, and its time is none of the future."""
    texts = (a.device_class, a.torch, a.time, a.origin)
    if not all(isinstance(t, str) and len(t) <= 200 and t.isprintable() for t in texts) or not a.device_class:
        return False
    if type(published) is not int or not 0 < published < time.time_ns() + _AHEAD_NS:
        return False
    if type(a.seconds) not in {int, float} or not (math.isfinite(a.seconds) and 0 <= a.seconds < 1e9):
        return False
    try:
        dt.datetime.fromisoformat(a.time)
    except ValueError:
        return False
    return type(a.tokens) is int and a.tokens == length + 2


def alike(vectors: Iterable[Fetched]) -> Iterator[tuple[Attestation, int, list[Fetched]]]:
    """Yield the vectors that can be one segment, with its attestation and its time: that of the oldest.

    What is invalidated of the oldest is of all of it, so that none outlives its own invalidation.
    """
    groups: dict[tuple[Any, ...], list[Fetched]] = {}
    for v in vectors:
        a = v.attestation
        groups.setdefault((a.device_class, a.torch, a.origin, v.array.shape), []).append(v)
    for (device_class, torch, origin, _), some in groups.items():
        seconds = round(sum(v.attestation.seconds for v in some), 6)
        tokens = sum(v.attestation.tokens for v in some)
        oldest = min(some, key=lambda v: v.published)
        attestation = Attestation(device_class, torch, oldest.attestation.time, seconds, tokens, origin)
        yield attestation, oldest.published, some


def _generation(trunk: str) -> str:
    return f"{KIND}:{trunk}"
