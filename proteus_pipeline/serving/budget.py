"""The books of one device's memory: who holds how many bytes, and who has to go so that more fit.

Pure: it is told what happens, frees nothing and takes no lock.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from proteus_pipeline.errors import CacheMemoryError
from proteus_pipeline.eviction.budget import to_evict
from proteus_pipeline.eviction.policies import Policy


@dataclass(frozen=True)
class Wanted:
    """What somebody asks room for, in bytes.

    Attributes
    ----------
    load
        Weights of a model to come.
    room
        What a usual call with that model takes.
    call
        A call that is about to begin.

    """

    load: int = 0
    room: int = 0
    call: int = 0


NOTHING = Wanted()


@dataclass
class Budget:
    """One device's memory.

    Attributes
    ----------
    limit
        Bytes that there may be, and in `limited_by` what sets that.
    policy
        The books of what is held, by key.
    held
        Bytes of the weights of each model that is served.
    reserved
        Bytes that loads under way have been given.
    rooms
        What a usual call takes with each model that is held or being loaded. Room for the largest of them is kept, so that one
        call can always begin; more than one at a time have to find room.
    calls
        Bytes that calls under way take.
    freeing
        Bytes of models that were let go, and that somebody still computes with.
    compressed
        Bytes of compressed copies; they are in this machine's memory only.

    """

    limit: int
    limited_by: str
    policy: Policy[str]
    held: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    rooms: dict[str, int] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)
    freeing: dict[int, int] = field(default_factory=dict)
    compressed: dict[str, int] = field(default_factory=dict)

    def by_kind(self, wanted: Wanted = NOTHING, kept: Collection[str] | None = None) -> dict[str, int]:
        """Return the bytes that count against the limit, by what they are for.

        Parameters
        ----------
        wanted
            What is there too.
        kept
            The only models that are there, without compressed copies; None for what there is.

        """
        held = self.held if kept is None else kept
        rooms = (self.rooms[key] for key in (*held, *self.reserved))
        return {
            "models": sum(self.held[key] for key in held),
            "loading": sum(self.reserved.values()) + wanted.load,
            "calls": max(sum(self.calls.values()) + wanted.call, wanted.room, *rooms),
            "freeing": sum(self.freeing.values()),
            "compressed": sum(self.compressed.values()) if kept is None else 0,
        }

    def total(self, wanted: Wanted = NOTHING, kept: Collection[str] | None = None) -> int:
        """Return the bytes that count against the limit: the sum of `by_kind`."""
        return sum(self.by_kind(wanted, kept).values())

    def at_last(self, wanted: Wanted, kept: Collection[str]) -> int:
        """Return the bytes that will count once loads and calls under way are done, and of the models only `kept` stay."""
        calls = max((wanted.call, wanted.room, *(self.rooms[key] for key in kept)))
        return sum(self.held[key] for key in kept) + wanted.load + calls

    def dropped_copies(self, wanted: Wanted) -> list[str]:
        """Return the compressed copies, the oldest first, that have to go for what is wanted, before any model goes."""
        over = self.total(wanted) - self.limit
        chosen = []
        for key, size in self.compressed.items():
            if over <= 0:
                break
            chosen.append(key)
            over -= size
        return chosen

    def evictions(self, wanted: Wanted, time: float, leased: Collection[str]) -> list[str]:
        """Return the models that have to go for what is wanted, and those that have expired, in their order."""
        return to_evict(self.policy, self.total(wanted), self.limit, time=time, protected=leased)

    def too_large(self, what: str, alone: int) -> CacheMemoryError:
        """Return what is said of something that would have no room if there were nothing else; `alone` is what it takes."""
        return CacheMemoryError(
            f"{what}, and the limit is {megabytes(self.limit)} ({self.limited_by})",
            f"set max_memory_gb to {alone / 1e9:.3g} or more, give shorter sequences, use a smaller tokens_per_batch, or"
            " precision bf16",
        )

    def no_room(self, what: str, leased: Collection[str]) -> CacheMemoryError:
        """Return what is said of something for which nothing more can go."""
        kinds = self.by_kind(kept=leased)
        names = {
            "models": "in use",
            "loading": "being loaded",
            "calls": "for calls",
            "freeing": "let go and still held",
        }
        taken = ", ".join(f"{megabytes(kinds[kind])} {name}" for kind, name in names.items() if kinds[kind])
        return CacheMemoryError(
            f"{what}, and of {megabytes(self.limit)} there are {taken}",
            "end a lease, drop encoders that were asked for by themselves, or set a larger max_memory_gb",
        )


def megabytes(count: int) -> str:
    """Return bytes as they are said in an error.

    >>> megabytes(237_440), megabytes(2_604_000_000)
    ('0.237 MB', '2,604 MB')
    """
    return f"{count / 1e6:,.0f} MB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
