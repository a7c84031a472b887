"""Each policy in a cache, against a reference on 10,000 random operations: the same keys after each one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import cachetools
import pytest

from proteus_pipeline.eviction.budget import to_evict
from proteus_pipeline.eviction.policies import POLICIES, Policy, make_policy

OPERATIONS, KEYS, LIMIT, TTL = 10_000, 150, 3000, 400.0
SIZES = [7 + (key * 37) % 193 for key in range(KEYS)]
COSTS = [0.5 + (key * 53) % 29 for key in range(KEYS)]


class Reference(ABC):
    @abstractmethod
    def ask(self, key: int, now: float) -> None:
        """Use a key, or let in one that is not here."""

    @abstractmethod
    def remove(self, key: int) -> None: ...

    @abstractmethod
    def keys(self) -> set[int]: ...


class Cachetools(Reference):
    def __init__(self, make: Callable[..., cachetools.Cache[int, int]]) -> None:
        self.cache = make(maxsize=LIMIT, getsizeof=lambda size: size)

    def ask(self, key: int, now: float) -> None:  # noqa: ARG002 - it has its own order
        if self.cache.get(key) is None:
            self.cache[key] = SIZES[key]

    def remove(self, key: int) -> None:
        self.cache.pop(key, None)

    def keys(self) -> set[int]:
        return set(self.cache)


@dataclass
class Row:
    key: int
    added: float
    uses: int = 1
    priority: float = 0.0


class BruteForce(Reference):
    """A list that is searched from end to end; of equals, the one that was added first goes."""

    def __init__(self, rank: Callable[[Row], float], ttl: float = float("inf")) -> None:
        self.rank, self.ttl = rank, ttl
        self.rows: list[Row] = []
        self.clock = 0.0

    def ask(self, key: int, now: float) -> None:
        self.rows = [row for row in self.rows if now - row.added < self.ttl]
        row = next((row for row in self.rows if row.key == key), None)
        if row is None:
            while sum(SIZES[r.key] for r in self.rows) + SIZES[key] > LIMIT:
                gone = min(self.rows, key=lambda r: (self.rank(r), r.added))
                self.clock = max(self.clock, gone.priority)
                self.rows.remove(gone)
            row = Row(key, now)
            self.rows.append(row)
        else:
            row.uses += 1
        row.priority = self.clock + row.uses * COSTS[key] / SIZES[key]

    def remove(self, key: int) -> None:
        self.rows = [row for row in self.rows if row.key != key]

    def keys(self) -> set[int]:
        return {row.key for row in self.rows}


REFERENCES: dict[str, Callable[[], Reference]] = {
    "lru": lambda: Cachetools(cachetools.LRUCache),
    "fifo": lambda: Cachetools(cachetools.FIFOCache),
    # Of equally rare keys, and of the young where there is no room, cachetools' LFU and TTL choose others than ours.
    "lfu": lambda: BruteForce(lambda row: row.uses),
    "ttl": lambda: BruteForce(lambda row: row.added, TTL),
    "cost": lambda: BruteForce(lambda row: row.priority),
}


class Ours(Reference):
    def __init__(self, name: str) -> None:
        self.policy: Policy[int] = make_policy(name, ttl=TTL if name == "ttl" else None)
        self.held: dict[int, int] = {}
        self.evicted = 0

    def ask(self, key: int, now: float) -> None:
        known = key in self.held
        more = 0 if known else SIZES[key]
        for gone in to_evict(self.policy, sum(self.held.values()) + more, LIMIT, time=now):
            self.policy.evicted(gone)
            del self.held[gone]
            self.evicted += 1
        if key in self.held:
            self.policy.used(key, now)
        else:
            self.policy.added(key, SIZES[key], COSTS[key], now)
            self.held[key] = SIZES[key]

    def remove(self, key: int) -> None:
        self.policy.removed(key)
        self.held.pop(key, None)

    def keys(self) -> set[int]:
        return set(self.held)


def test_every_policy_has_a_reference():
    assert REFERENCES.keys() == POLICIES.keys()


@pytest.mark.parametrize("name", POLICIES)
def test_a_cache_holds_what_its_reference_holds(name: str):
    dice, ours, reference = Random(11), Ours(name), REFERENCES[name]()
    for second in range(OPERATIONS):
        # Some keys are asked for far more often than others, as models are; a few are removed.
        key = min(int(dice.paretovariate(0.7)) - 1, KEYS - 1) if dice.random() < 0.7 else dice.randrange(KEYS)
        if dice.random() < 0.03:
            ours.remove(key)
            reference.remove(key)
        else:
            ours.ask(key, float(second))
            reference.ask(key, float(second))
        assert ours.keys() == reference.keys(), f"after {second} operations"
    assert ours.evicted > OPERATIONS / 20
