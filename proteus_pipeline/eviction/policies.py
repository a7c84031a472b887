"""What to evict first: policies that keep books of keys, and nothing else.

A policy holds no values, takes no lock, reads no clock and no file. It is told what happened and when, so that a live
cache and a log that is replayed come to the same order. To add one: a class with its `Policy.rank`, a row in `POLICIES`.

>>> policy = make_policy("lru")
>>> policy.added("a", size=10, cost=1.0, time=0.0)
>>> policy.added("b", size=10, cost=1.0, time=1.0)
>>> policy.used("a", time=2.0)
>>> list(policy.order())
['b', 'a']
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from proteus_pipeline.errors import ConfigError

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class Item:
    """What is known of one key.

    Attributes
    ----------
    size
        In bytes.
    cost
        Seconds that getting it again would take.
    added
        When it came.
    last
        When it was last used, or came.
    uses
        How often it was used; its coming is the first.
    priority
        What `Cost` made of these when the item was last used.

    """

    size: int
    cost: float
    added: float
    last: float
    uses: int = 1
    priority: float = 0.0


class Policy(ABC, Generic[K]):
    """Books of what a cache holds, and in which order it should let go.

    Times are seconds from any origin, one for all calls. Two processes may log the same thing, and one may use what
    another has just evicted: a use or a removal of a key that is not here changes nothing.
    """

    def __init__(self) -> None:
        self._items: dict[K, Item] = {}

    @abstractmethod
    def rank(self, item: Item) -> float:
        """Return what the order goes by: the least is evicted first."""

    def added(self, key: K, size: int, cost: float, time: float) -> None:
        """Enter a key; one that is here already starts anew.

        Raises
        ------
        ValueError
            For a number that would break the order: a negative size or cost, a NaN, an infinity.

        """
        if size < 0 or cost < 0 or not (math.isfinite(size) and math.isfinite(cost) and math.isfinite(time)):
            raise ValueError(f"an item of {size} bytes, {cost} seconds, at {time}, can't be put in order")
        self.removed(key)
        self._items[key] = Item(size=size, cost=cost, added=time, last=time)

    def used(self, key: K, time: float, times: int = 1) -> None:
        """Count a use, or several, the latest at a time. A log may be out of order: what counts is the latest time."""
        item = self._items.get(key)
        if item is not None:
            item.uses += times
            item.last = max(item.last, time)

    def resized(self, key: K, size: int) -> None:
        """Enter another size of a key that is here; what it costs, and where it stands, is as before until it is used."""
        item = self._items.get(key)
        if item is not None:
            item.size = size

    def removed(self, key: K) -> None:
        """Forget a key that went for another reason than room: deleted, invalidated, damaged."""
        self._items.pop(key, None)

    def evicted(self, key: K) -> None:
        """Forget a key that went because of this policy."""
        self.removed(key)

    def take_over(self, other: Policy[K]) -> None:
        """Enter all that another policy knows, with its ages, uses and costs; the other keeps its own books."""
        for key, item in sorted(other._items.items(), key=lambda pair: pair[1].added):
            self._items[key] = replace(item)

    def size(self, key: K) -> int:
        """Return the bytes of a key that is here."""
        return self._items[key].size

    def order(self) -> Iterator[K]:
        """Return all keys, the one to evict first first; of equals, the one that was added first.

        The order is that of the call: later changes do not show in it. Its first keys cost O(n), each further one
        O(log n).
        """
        heap = [(self.rank(item), item.added, number, key) for number, (key, item) in enumerate(self._items.items())]
        heapq.heapify(heap)
        return (heapq.heappop(heap)[-1] for _ in range(len(heap)))

    def expired(self, time: float) -> list[K]:  # noqa: ARG002  # only some policies look at it
        """Return the keys that are too old at a time, whether or not there is room; oldest first."""
        return []


class Lru(Policy[K]):
    """The one that has not been used for longest."""

    def rank(self, item: Item) -> float:
        return item.last


class Lfu(Policy[K]):
    """The one that was used least often. Counts never fade: what was popular once stays long."""

    def rank(self, item: Item) -> float:
        return item.uses


class Fifo(Policy[K]):
    """The one that was added first, used or not."""

    def rank(self, item: Item) -> float:
        return item.added


class Ttl(Fifo[K]):
    """The one that was added first; and each, once it has been here for so many seconds, used or not.

    Parameters
    ----------
    ttl
        Seconds.

    Raises
    ------
    ConfigError
        For a `ttl` that is not more than 0.

    """

    def __init__(self, ttl: float) -> None:
        super().__init__()
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not ttl > 0:
            raise ConfigError(f"ttl={ttl!r} is no time to live", "use a number of seconds above 0")
        self.ttl = ttl

    def expired(self, time: float) -> list[K]:
        return list(takewhile(lambda key: time - self._items[key].added >= self.ttl, self.order()))


class Cost(Policy[K]):
    """The one whose bytes save the fewest seconds: GreedyDual-Size-Frequency.

    Each time an item is added or used, its priority becomes ``clock + uses * cost / size``; the least is evicted, and
    the clock rises to its priority, so that what is not used any more ages. From L. Cherkasova, "Improving WWW Proxies
    Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Laboratories HPL-98-69R1, 1998.

    The clock is raised by `evicted` alone: a log that is replayed must hold its evictions too, in their order.

    Attributes
    ----------
    clock
        The greatest priority that was evicted, in seconds per byte.

    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0.0

    def rank(self, item: Item) -> float:
        return item.priority

    def added(self, key: K, size: int, cost: float, time: float) -> None:
        super().added(key, size, cost, time)
        self._prioritise(key)

    def used(self, key: K, time: float, times: int = 1) -> None:
        super().used(key, time, times)
        self._prioritise(key)

    def evicted(self, key: K) -> None:
        item = self._items.get(key)
        if item is not None:
            self.clock = max(self.clock, item.priority)
        super().evicted(key)

    def take_over(self, other: Policy[K]) -> None:
        super().take_over(other)
        for key in self._items:
            self._prioritise(key)

    def _prioritise(self, key: K) -> None:
        item = self._items.get(key)
        if item is not None:
            item.priority = self.clock + item.uses * item.cost / max(item.size, 1)


POLICIES: Mapping[str, type[Policy[Any]]] = MappingProxyType(
    {"lru": Lru, "lfu": Lfu, "fifo": Fifo, "ttl": Ttl, "cost": Cost}
)
DEFAULT_POLICY = "lru"


def make_policy(name: str = DEFAULT_POLICY, *, ttl: float | None = None) -> Policy[Any]:
    """Return an empty policy.

    Parameters
    ----------
    name
        One of `POLICIES`.
    ttl
        For ``ttl``, which needs it: after how many seconds an item expires.

    Raises
    ------
    ConfigError
        For a name that is not known; a `ttl` that is missing, no number of seconds, or not this policy's.

    """
    if not isinstance(name, str) or name not in POLICIES:
        raise ConfigError(f"eviction policy {name!r} is not known", f"use one of {', '.join(POLICIES)}")
    if name == "ttl":
        if ttl is None:
            raise ConfigError("eviction policy 'ttl' has no time to live", "give its seconds with ttl")
        return Ttl(ttl)
    if ttl is not None:
        raise ConfigError(f"eviction policy {name!r} has no ttl", "leave ttl out, or use the policy 'ttl'")
    return POLICIES[name]()
