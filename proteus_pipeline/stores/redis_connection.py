"""A connection to Redis that ends each round trip in time, and brings no more than said, whatever the server does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from proteus_pipeline.stores.redis_url import RedisPlace

if TYPE_CHECKING:
    import redis

# One wait for the server, and one whole round trip: a server that sends a byte now and then is slow too. Seconds.
TIMEOUT_S, TRIP_S = 0.25, 1.0
# What a trip may bring is bounded, whoever put what there.
_TRIP_BYTES = 32 << 20


class Trip(threading.local):
    """How long the round trip that this thread makes may take yet, and how much it may bring."""

    until = float("inf")
    left = _TRIP_BYTES

    def begin(self) -> None:
        """A round trip begins now."""
        self.until, self.left = time.monotonic() + TRIP_S, _TRIP_BYTES

    def timeout(self) -> float:
        """Return how long the next wait may take, seconds; `TimeoutError` where the trip's time is over."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the round trip takes too long")
        return min(TIMEOUT_S, left)

    def brought(self, count: int) -> int:
        """Note so many bytes that came, and return their number; `ConnectionError` where they are too many."""
        self.left -= count
        if self.left < 0:
            raise ConnectionError("the answer is too large")
        return count


class _Bounded:
    """A socket that keeps to its thread's round trip: a timeout alone begins anew with each byte that comes."""

    def __init__(self, inner: socket.socket, trip: Trip) -> None:
        self._inner, self._trip = inner, trip

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def recv_into(self, buffer: Any, *args: int) -> int:
        self._inner.settimeout(self._trip.timeout())
        return self._trip.brought(self._inner.recv_into(buffer, *args))

    def recv(self, size: int, *args: int) -> bytes:
        if args:  # a look whether it is closed, which waits for nothing
            return self._inner.recv(size, *args)
        self._inner.settimeout(self._trip.timeout())
        data = self._inner.recv(size)
        self._trip.brought(len(data))
        return data

    def sendall(self, data: bytes) -> None:
        self._inner.settimeout(self._trip.timeout())
        self._inner.sendall(data)


def connect(place: RedisPlace, trip: Trip) -> redis.Redis:
    """Return a client of redis-py that asks once, and waits as long as said here; it connects when it is first used."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    base: type[redis.Connection] = redis.SSLConnection if place.tls else redis.Connection

    class Bounded(base):  # type: ignore[misc, valid-type]
        def _connect(self) -> _Bounded:
            return _Bounded(super()._connect(), trip)

    pool = redis.ConnectionPool(
        connection_class=Bounded,
        **place.options(),
        protocol=2,  # version 3 brings a handshake and pushed messages that nothing here needs
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    return redis.Redis(connection_pool=pool)


def reason(error: Exception) -> str:
    """Say what went wrong; never by the library's own text, which may hold what it was given."""
    import ssl

    import redis

    if isinstance(error, redis.AuthenticationError):
        return "refuses this user or password"
    if isinstance(error, redis.TimeoutError | TimeoutError):
        return "does not answer in time"
    if isinstance(error, redis.ResponseError):
        return f"refuses what it was asked ({type(error).__name__})"
    if isinstance(error, redis.ConnectionError | OSError):
        trusted = not any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error))
        return "can't be reached" if trusted else "can't be reached: its certificate is none to trust under that name"
    return f"gives answers that are none ({type(error).__name__})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
