"""The books of one device's memory: who holds how many bytes, and who has to go so that more fit.

Pure: it is told what happens, frees nothing and takes no lock.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from proteus_pipeline.eviction.budget import to_evict
from proteus_pipeline.eviction.policies import Policy


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
        Bytes of each model that is served, weights and room for a call's activations.
    reserved
        Bytes that loads under way have been given.
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
    freeing: dict[int, int] = field(default_factory=dict)
    compressed: dict[str, int] = field(default_factory=dict)

    def by_kind(self) -> dict[str, int]:
        """Return the bytes that count against the limit, by what they are for."""
        return {
            "models": sum(self.held.values()),
            "loading": sum(self.reserved.values()),
            "freeing": sum(self.freeing.values()),
            "compressed": sum(self.compressed.values()),
        }

    @property
    def used(self) -> int:
        """Bytes that count against the limit."""
        return sum(self.by_kind().values())

    def least(self, leased: Collection[str]) -> int:
        """Return the bytes that would still count if all went that may go."""
        kinds = self.by_kind()
        return self.in_use(leased) + kinds["loading"] + kinds["freeing"]

    def in_use(self, leased: Collection[str]) -> int:
        """Return the bytes of the models that are leased."""
        return sum(self.held[key] for key in leased)

    def dropped_copies(self, more: int) -> list[str]:
        """Return the compressed copies, the oldest first, that have to go so that `more` bytes fit, before any model goes."""
        over = self.used + more - self.limit
        chosen = []
        for key, size in self.compressed.items():
            if over <= 0:
                break
            chosen.append(key)
            over -= size
        return chosen

    def evictions(self, more: int, time: float, leased: Collection[str]) -> list[str]:
        """Return the models that have to go so that `more` bytes fit, and those that have expired, in their order."""
        return to_evict(self.policy, self.used + more, self.limit, time=time, protected=leased)
