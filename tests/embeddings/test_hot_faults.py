"""Redis killed, paused, flushed, poisoned and cut off under load: nothing wrong is ever served, and nobody waits long."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import redis
from cutting import CuttingProxy
from entries import HERE, TRUNK
from redis_server import RedisServer, redis_server

from proteus_pipeline.embeddings.hot import HotTier, Offered
from proteus_pipeline.embeddings.index import Attestation, SegmentHeader
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.stores import redis as client_file
from proteus_pipeline.stores.redis import RedisClient
from proteus_pipeline.stores.redis_connection import TRIP_S
from proteus_pipeline.stores.sealed import Seal

TORTURE = os.environ.get("PROTEUS_TORTURE") == "1"
VECTORS = 2000
POISONED = 1000 if TORTURE else 200
ROUNDS = 10 if TORTURE else 1
WORKERS = 6
# A look-up here is two round trips, of the generation and of the vectors, each slow at worst; and what a busy machine adds.
BOUND_S = 2 * TRIP_S + 1.0

RECIPE = Recipe(layer=2)
SECRET = "a secret of this lab"
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def sequence(number: int) -> str:
    return "".join(random.Random(number).choices(RESIDUES, k=20 + number % 50))


SEQUENCES = {RECIPE.key(TRUNK, s): s for s in map(sequence, range(VECTORS))}
KEYS = list(SEQUENCES)


def vector(key: str) -> np.ndarray:
    """What a model would compute: known by the key alone."""
    return np.random.default_rng(int(key, 16)).standard_normal(320).astype("<f4")


def header() -> SegmentHeader:
    now = time.time_ns()
    attestation = Attestation(HERE, "2.13.0", "2026-01-01T00:00:00+00:00", 1.0, 1000)
    return SegmentHeader(f"{now:020d}-ab.zip", 1, "pooled", "fp32", 320, TRUNK, RECIPE.described(), attestation, 1)


class Load:
    """Machines at work, each with a client of its own: they look up, check, compute what is missing, and offer it."""

    def __init__(self, url: str) -> None:
        self.over = threading.Event()
        self.wrong: list[str] = []
        self.hits = self.looked_up = 0
        self.slowest = 0.0
        self.clients = [RedisClient(url, seal=Seal(SECRET)) for _ in range(WORKERS)]
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(WORKERS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        chance, tier = random.Random(number), HotTier(self.clients[number])
        while not self.over.is_set():
            some = chance.sample(KEYS, 300)
            run = tier.run(TRUNK, RECIPE)
            assert run is not None
            found = self._timed(lambda run=run, some=some: run.fetch({k: SEQUENCES[k] for k in some}, []))
            bad = [f.key for f in found if f.array.tobytes() != vector(f.key).tobytes()]
            missing = set(some) - {f.key for f in found}
            offered = [Offered(k, vector(k), len(SEQUENCES[k])) for k in missing]
            self._timed(lambda run=run, offered=offered: run.offer(header(), offered))
            with self._lock:
                self.wrong += bad
                self.hits += len(found)
                self.looked_up += len(some)

    def _timed(self, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = call()
        with self._lock:
            self.slowest = max(self.slowest, time.monotonic() - began)
        return result

    def wait_for_hits(self, more: int = 1000) -> None:
        """Wait until machines are served again."""
        wanted, deadline = self.hits + more, time.monotonic() + 30
        while self.hits < wanted:
            assert time.monotonic() < deadline, "nobody was served again"
            time.sleep(0.02)


def poison(server: RedisServer, chance: random.Random) -> None:
    """Spoil values as damage would, and as somebody would who knows all but the secret."""
    here = redis.Redis.from_url(server.url)
    there = [key for key in here.keys("proteus:1:vector:*") if b":generation:" not in key]  # type: ignore[union-attr]
    values = dict(zip(there, here.mget(there), strict=True))  # type: ignore[arg-type]
    known = [key for key, value in values.items() if value]
    for number, key in enumerate(chance.choices(known, k=POISONED)):
        value = values[key]
        kind = number % 5
        if kind == 0:
            value = values[chance.choice(known)]  # swapped
        elif kind == 1:
            value = value[: chance.randrange(len(value))]
        elif kind == 2:
            at = chance.randrange(len(value))
            value = value[:at] + bytes([value[at] ^ 1 << chance.randrange(8)]) + value[at + 1 :]
        elif kind == 3:  # sound in all but the seal
            value = Seal().seal(key, value[44:-8] + bytes(8))
        else:
            value = Seal("s" * 20).seal(key, value[44:-8] + bytes(8))
        if number % 7:
            here.set(key, value)
        else:
            # Both at once: in between, a worker may put a vector there.
            here.pipeline(transaction=True).delete(key).lpush(key, b"not a string").execute()


def restart(server: RedisServer, load: Load, chance: random.Random) -> None:
    server.kill()
    time.sleep(chance.uniform(0, 0.4))
    server.start()


def hang(server: RedisServer, load: Load, chance: random.Random) -> None:
    server.pause()
    time.sleep(chance.uniform(0.3, 1.5))
    server.resume()


@pytest.mark.torture
def test_nothing_that_happens_to_redis_makes_a_wrong_vector_or_a_long_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(client_file, "LONGEST_PAUSE_S", 1.0)  # the test does not wait a minute for it to be asked again
    chance = random.Random(7)
    with redis_server(tmp_path) as server, CuttingProxy(server.port) as proxy:
        with Load(f"redis://127.0.0.1:{proxy.port}/0") as load:
            load.wait_for_hits()
            for _ in range(ROUNDS):
                poison(server, chance)
                load.wait_for_hits()
                for _ in range(5):
                    proxy.cut()
                    time.sleep(chance.uniform(0, 0.1))
                load.wait_for_hits()
                hang(server, load, chance)
                load.wait_for_hits()
                redis.Redis.from_url(server.url).flushall()
                load.wait_for_hits()
                restart(server, load, chance)
                load.wait_for_hits()
        rejected = sum(client.rejected for client in load.clients)
        failures = sum(client.failures for client in load.clients)
    print(
        f"{load.looked_up} look-ups, {load.hits} hits, {rejected} rejected, {failures} failures, {load.slowest:.2f} s"
    )
    assert not load.wrong
    assert load.slowest < BOUND_S
    # A list in a value's place is no value to Redis itself; the others are read, unless they are written over before.
    assert rejected > POISONED * ROUNDS / 10 and failures
    levels = [r.levelno for r in caplog.records if r.levelno >= logging.WARNING]
    outages = [r for r in caplog.records if "going on without it" in r.getMessage() and r.levelno >= logging.WARNING]
    # One each at most, of a client's two: that it was gone, that it was poisoned.
    assert 1 <= len(outages) <= WORKERS and len(levels) <= 2 * WORKERS
