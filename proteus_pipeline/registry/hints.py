"""Whether a group may have published something: a hint of Redis's, which spares most looks at the git remote.

Nothing is believed for long: what came past Redis (``git push`` by hand, a member without it) shows after `TRUSTED_S`, and a
change is always made after a look. A generation is drawn by chance, so that none comes twice when Redis loses its memory.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proteus_pipeline.stores.redis import RedisClient

TRUSTED_S = 5.0


class Hints:
    """What Redis says of one group's registry; where it says nothing, the remote is asked.

    Parameters
    ----------
    redis
        The server.
    group
        What all of the group name alike: where its weights lie.

    """

    def __init__(self, redis: RedisClient, group: str) -> None:
        self._redis = redis
        self._name = f"versions-{hashlib.sha256(group.encode()).hexdigest()[:16]}"
        self._looked: tuple[str, float] | None = None

    def unchanged(self) -> bool:
        """Say whether nobody has told of a change since the last look, and that was a moment ago."""
        looked = self._looked
        return bool(looked and time.monotonic() - looked[1] < TRUSTED_S and self.generation() == looked[0])

    def generation(self) -> str | None:
        """Return the registry's generation, taken before a look; None where Redis can't be asked."""
        return self._redis.generation(self._name)

    def looked(self, generation: str | None) -> None:
        """Note that the remote was looked at, after `generation` was taken."""
        self._looked = (generation, time.monotonic()) if generation else None

    def published(self) -> None:
        """Tell everybody that there is something new."""
        self._looked = None
        self._redis.advance(self._name)

    def count(self, metric: str, value: int) -> None:
        """Count something for the whole group."""
        self._redis.increment(self._name, {metric: value})

    def counted(self, metric: str) -> int | None:
        """Return what the group has counted; None where Redis can't be asked."""
        return self._redis.counters(self._name, [metric]).get(metric)
