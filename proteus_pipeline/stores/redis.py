"""Redis, as a helper that may be gone at any moment: nothing here waits long for it, fails for it, or believes it blindly.

In it are copies of what is elsewhere, and hints. Every method says None, nothing or False where Redis can't be asked, so that
a caller does what it would do without it. After a failure Redis is not asked again for a second, then two, up to a minute.

Keys are ``proteus:1:KIND:NAME``, where 1 is the format of what lies there.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.stores.counts import count
from proteus_pipeline.stores.redis_connection import Trip, connect, reason
from proteus_pipeline.stores.redis_url import parse_url
from proteus_pipeline.stores.sealed import FORMAT, Seal

if TYPE_CHECKING:
    import redis

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
# The largest value; values of one round trip.
MOST_BYTES = 1 << 20
_BATCH = 512
_LEASE_PAUSE_S = 0.05
_TOKEN = re.compile(rb"[0-9a-f]{32}")
# Gives a lease back only to who holds it still.
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"
_log = logging.getLogger(__name__)


class RedisClient:
    """A Redis or Valkey server, of which nothing is expected.

    No method raises for what the server does or does not do; one warning is logged when it first fails, and one when a value
    is first refused. A round trip ends within `TRIP_S` once the server's name is resolved, and the first that fails ends the call.

    Parameters
    ----------
    url
        ``redis://USER:PASSWORD@HOST:PORT/DB``, or ``rediss://`` for TLS, there with ``?ssl_ca_certs=FILE`` for an authority of
        one's own.
    seal
        How values are told from what somebody else put there; by default ``PROTEUS_REDIS_SECRET``'s.

    Attributes
    ----------
    place
        Where it is; without secrets when shown.
    rejected
        How many values were refused, since they were not what was put under their key.
    failures
        How many round trips failed.
    unanswered
        How many values could not be asked for.

    Raises
    ------
    ConfigError
        When the URL can't be read, the secret is too short, or redis-py is not installed.

    """

    def __init__(self, url: str, *, seal: Seal | None = None) -> None:
        self.place = parse_url(url)
        self.rejected = self.failures = self.unanswered = 0
        self._seal = seal or Seal.of_environment()
        self._trip = Trip()
        if find_spec("redis") is None:
            raise ConfigError(
                "Redis needs the library redis, which is not installed", "pip install 'proteus_pipeline[redis]'"
            )
        self._lock = threading.Lock()
        self._pause, self._closed_until = 0.0, 0.0
        self._warned: set[str] = set()

    @cached_property
    def _redis(self) -> redis.Redis:
        return connect(self.place, self._trip)

    def __repr__(self) -> str:
        return f"RedisClient({str(self.place)!r})"

    @property
    def answers(self) -> bool:
        """Whether the server answers a PING now."""
        return bool(self._ask(lambda r: r.ping(), False))

    def get_many(self, kind: str, names: Sequence[str]) -> dict[str, memoryview]:
        """Return the sound values of those names that have one.

        Parameters
        ----------
        kind
            What sort of value, such as ``vector``.
        names
            Any number; asked for some hundred at a time.

        """
        found: dict[str, memoryview] = {}
        asked = came = 0
        for some in _batches(names):
            keys = [_key(kind, name) for name in some]
            values = self._ask(partial(_mget, keys), None)
            if values is None:
                break
            asked += len(some)
            for name, key, value in zip(some, keys, values, strict=False):
                if value is None:
                    continue
                came += len(value)
                payload = self._seal.open(key, value) if len(value) <= MOST_BYTES else None
                if payload is None:
                    self._reject()
                else:
                    found[name] = payload
        with self._lock:
            self.unanswered += len(names) - asked
        if came:
            count("proteus_cache_fetched_bytes_total", came, cache="redis")
        return found

    def put_many(self, kind: str, values: Mapping[str, bytes], *, ttl: float) -> int:
        """Put values there, in place of what was there, and return how many Redis took.

        Parameters
        ----------
        kind
            As for `get_many`.
        values
            By name; one that is larger than `MOST_BYTES` is passed over.
        ttl
            After how many seconds Redis forgets them.

        """
        taken = 0
        sealed = ((key := _key(kind, name), self._seal.seal(key, value)) for name, value in values.items())
        for some in _portions((key, value) for key, value in sealed if len(value) <= MOST_BYTES):

            def put(r: Any, some: Sequence[tuple[bytes, bytes]] = some) -> int:
                pipe = r.pipeline(transaction=False)
                for key, value in some:
                    pipe.set(key, value, px=max(1, int(ttl * 1000)))
                return len(pipe.execute())

            done = self._ask(put, 0)
            taken += done
            if not done:
                break
            count("proteus_cache_sent_bytes_total", sum(len(value) for _, value in some), cache="redis")
        return taken

    def delete(self, kind: str, names: Sequence[str]) -> bool:
        """Remove values; False where Redis could not be asked."""
        return all(self._ask(partial(_delete, [_key(kind, name) for name in some]), False) for some in _batches(names))

    def increment(self, name: str, counts: Mapping[str, int]) -> bool:
        """Add to counters that all share; False where Redis could not be asked. Anybody may have changed them."""

        def add(r: Any) -> bool:
            pipe = r.pipeline(transaction=False)
            for field, number in counts.items():
                pipe.hincrby(_key("counters", name), field, number)
            pipe.execute()
            return True

        return self._ask(add, False)

    def counters(self, name: str, fields: Sequence[str]) -> dict[str, int]:
        """Return shared counters, 0 for one that nobody raised yet; nothing where Redis could not be asked."""
        values = self._ask(lambda r: r.hmget(_key("counters", name), list(fields)), None)
        if values is None:
            return {}
        return {field: _number(value) for field, value in zip(fields, values, strict=False)}

    def generation(self, name: str) -> str | None:
        """Return the generation of something, begun now where it has none; None where Redis could not be asked.

        A generation is 32 digits by chance, and no number: after a loss of Redis's memory none comes twice.
        """
        key = _key("generation", name)

        def begun(r: Any) -> bytes | None:
            pipe = r.pipeline(transaction=False)
            pipe.set(key, secrets.token_hex(16), nx=True)
            pipe.get(key)
            found: bytes | None = pipe.execute()[1]
            return found

        answer = self._ask(begun, None)
        if answer is not None and _token(answer) is None:
            self._reject()
            return self.advance(name)
        return _token(answer)

    def generations(self, names: Sequence[str]) -> dict[str, str]:
        """Return the generations of some things, "" for one that has none; nothing where Redis could not be asked."""
        if not names:
            return {}
        values = self._ask(partial(_mget, [_key("generation", name) for name in names]), None)
        return {} if values is None else {n: _token(v) or "" for n, v in zip(names, values, strict=False)}

    def advance(self, name: str) -> str | None:
        """Begin a new generation of something, for all who ask, and return it; None where Redis could not be asked."""
        token = secrets.token_hex(16)
        return token if self._ask(lambda r: r.set(_key("generation", name), token), None) else None

    @contextmanager
    def lease(self, name: str, *, seconds: float, wait: float = 0.0) -> Iterator[bool]:
        """Hold a name in a ``with`` block, and yield whether it is held.

        Advice only: it ends after `seconds` whatever its holder does, and with Redis's memory, so that two may hold it.

        Parameters
        ----------
        name
            Of what one at a time should do.
        seconds
            The longest that it is held.
        wait
            For how long to wait for who holds it.

        """
        key, token = _key("lease", name), secrets.token_hex(16)
        deadline = time.monotonic() + wait

        def take(r: Any) -> bool:
            return bool(r.set(key, token, nx=True, px=max(1, int(seconds * 1000))))

        while (held := self._ask(take, None)) is False:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(_LEASE_PAUSE_S, left))
        try:
            yield bool(held)
        finally:
            if held:
                self._ask(lambda r: r.eval(_RELEASE, 1, key, token), None)

    def close(self) -> None:
        """Close the connections; asking again opens them."""
        self._redis.close()

    def _ask(self, question: Callable[[Any], T], otherwise: T) -> T:
        """Ask Redis, unless it failed a moment ago; where it can't be asked, that is the answer."""
        with self._lock:
            if time.monotonic() < self._closed_until:
                return otherwise
            if self._pause:
                # One asks whether it is back; the others go on without it meanwhile.
                self._closed_until = time.monotonic() + self._pause
        try:
            client = self._redis
            self._trip.begin()
            answer = question(client)
        except Exception as error:  # noqa: BLE001 - whatever a server's answer makes of the library, work goes on without it
            self._failed(error)
            return otherwise
        if self._pause:
            with self._lock:
                self._pause = self._closed_until = 0.0
            _log.info("Redis at %s answers again", self.place)
        return answer

    def _failed(self, error: Exception) -> None:
        import redis

        # Who refuses has answered, and at once: a server that is full can still be read.
        refused = isinstance(error, redis.ResponseError)
        with self._lock:
            self.failures += 1
            if not refused:
                self._pause = min(max(2 * self._pause, FIRST_PAUSE_S), LONGEST_PAUSE_S)
                self._closed_until = time.monotonic() + self._pause
        text = f"Redis at {self.place} {reason(error)}: going on without it, slower and with the same results"
        self._warn("down", text)

    def _reject(self) -> None:
        with self._lock:
            self.rejected += 1
        self._warn(
            "rejected",
            f"Redis at {self.place} has values that are not what was put under their keys (damaged, or another "
            "PROTEUS_REDIS_SECRET's): they are not used",
        )

    def _warn(self, what: str, text: str) -> None:
        with self._lock:
            first = what not in self._warned
            self._warned.add(what)
        _log.log(logging.WARNING if first else logging.DEBUG, "%s", text)


def _key(kind: str, name: str) -> bytes:
    return f"proteus:{FORMAT}:{kind}:{name}".encode("utf-8", "surrogateescape")


def _mget(keys: Sequence[bytes], r: Any) -> list[bytes | None]:
    return r.mget(keys)  # type: ignore[no-any-return]


def _delete(keys: Sequence[bytes], r: Any) -> bool:
    return int(r.delete(*keys)) >= 0


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + _BATCH] for start in range(0, len(names), _BATCH))


def _portions(values: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Yield values as they go in one round trip: few enough for a slow network."""
    some: list[tuple[bytes, bytes]] = []
    nbytes = 0
    for key, value in values:
        if some and (len(some) == _BATCH or nbytes + len(value) > 4 * MOST_BYTES):
            yield some
            some, nbytes = [], 0
        some.append((key, value))
        nbytes += len(value)
    if some:
        yield some


def _token(value: bytes | None) -> str | None:
    return value.decode() if value is not None and _TOKEN.fullmatch(value) else None


def _number(value: bytes | None) -> int:
    try:
        return int(value) if value is not None and len(value) < 20 else 0
    except ValueError:
        return 0
