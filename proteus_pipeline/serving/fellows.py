"""What model caches in other processes and clones tell each other over Redis: which names to look at anew, what they counted
together, and who is loading. Nothing else: each has its own models, and its own registry says what a name means.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.stores.redis import RedisClient
from proteus_pipeline.stores.redis_url import VARIABLE, given_url

# How old what was heard may be at a look-up, seconds; Redis is asked no more often than that.
STALE_S = 1.0
# For how long a load waits for another process's on this machine, and the longest that one may hold others up.
TURN_WAIT_S, TURN_S = 5.0, 30.0
_COUNTERS = "models"
COUNTED = ("hits", "misses", "loads", "restored", "load_failures", "evictions")
_log = logging.getLogger(__name__)


class Fellows:
    """The other model caches that use a Redis.

    Parameters
    ----------
    client
        Of the Redis; where it is gone, nobody is heard, and each goes on alone.

    """

    def __init__(self, client: RedisClient) -> None:
        self.client = client
        self._lock = threading.Lock()
        self._honouring = threading.Lock()
        self._heard: dict[str, str] = {}
        self._pending: set[str] = set()
        self._asked = self._counted = float("-inf")
        self._sent: dict[str, int] = dict.fromkeys(COUNTED, 0)

    @classmethod
    def at(cls, url: str | None) -> Fellows:
        """Return those at a URL, or else at ``PROTEUS_REDIS_URL``.

        Raises
        ------
        ConfigError
            When there is no URL, or none that can be read, or redis-py is not installed.

        """
        found = given_url(url)
        if found is None:
            raise ConfigError(
                "distributed=True needs a Redis, and none is named", f"set {VARIABLE}, or give redis_url="
            )
        return cls(RedisClient(found))

    def listen(self, name: str) -> None:
        """Ask which names others have told of, if it is time to, for a name that is being looked up.

        One thread at a time asks; the others go on with what was heard before.
        """
        known = name in self._heard
        if (known and time.monotonic() - self._asked < STALE_S) or not self._lock.acquire(blocking=False):
            return
        try:
            self._asked = time.monotonic()
            names = list(self._heard | {name: ""})
            told = self.client.generations([_topic(n) for n in names])
            said = {n: told[_topic(n)] for n in names if _topic(n) in told}
            # Who looks a name up for the first time has nothing that could be too old.
            self._pending |= {n for n, generation in said.items() if self._heard.get(n, generation) != generation}
            self._heard |= said
            # While Redis is gone, a new name must not be asked about at each look-up.
            self._heard.setdefault(name, "")
        finally:
            self._lock.release()

    def forget(self, name: str) -> None:
        """Ask no more about a name that means nothing: names come from requests, and there is no end to them."""
        with self._lock:
            self._heard.pop(name, None)

    def honour(self, name: str, look_again: Callable[[], None]) -> None:
        """Look at a name anew, where others have told of it; who looks it up meanwhile waits, and who fails leaves it to the next."""
        if name not in self._pending:
            return
        with self._honouring:
            if name not in self._pending:
                return
            self._pending.discard(name)  # first: what is told from now on counts anew
            try:
                look_again()
            except BaseException:
                self._pending.add(name)
                raise

    def tell(self, name: str) -> None:
        """Have all look at a name anew; say so where they can't be told."""
        with self._lock:
            generation = self.client.advance(_topic(name))
            if generation is not None:
                self._heard[name] = generation
        if generation is None:
            _log.warning(
                "Redis at %s was not told that %s is invalidated: other processes serve it as before; "
                "invalidate again when it answers",
                self.client.place,
                name,
            )

    def count(self, counts: Mapping[str, int], *, at_once: bool = False) -> None:
        """Add what this cache has counted since the last time to what all have; now, or where the last time is a while ago."""
        if not at_once and time.monotonic() - self._counted < STALE_S:
            return
        with self._lock:
            self._counted = time.monotonic()
            more = {n: counts[n] - self._sent[n] for n in COUNTED if counts[n] != self._sent[n]}
            if more and self.client.increment(_COUNTERS, more):
                self._sent |= {n: counts[n] for n in more}

    def counted(self) -> dict[str, int] | None:
        """Return what all have counted together, ever; None where Redis can't be asked."""
        return self.client.counters(_COUNTERS, COUNTED) or None

    @contextmanager
    def turn(self, digest: str) -> Iterator[None]:
        """Load a model in a ``with`` block while no other process of this machine does, or after a while all the same."""
        machine = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:16]
        with self.client.lease(f"load:{machine}:{digest}", seconds=TURN_S, wait=TURN_WAIT_S):
            yield


def _topic(name: str) -> str:
    return f"model:{name}"
