"""What one device's memory holds, and the books of it: models, their leases, compressed copies of those that were let go.

One lock guards the books. Compressing happens outside of it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import CacheMemoryError, IntegrityError
from proteus_pipeline.eviction.policies import make_policy
from proteus_pipeline.models.memory import give_back, keep_large_arrays_apart
from proteus_pipeline.models.workers import thread_count
from proteus_pipeline.serving.budget import NOTHING, Budget, Wanted, megabytes
from proteus_pipeline.serving.calls import Call
from proteus_pipeline.serving.compressed import Packed, measure
from proteus_pipeline.serving.resident import Resident
from proteus_pipeline.serving.settings import CacheSettings
from proteus_pipeline.serving.statistics import Counts
from proteus_pipeline.stores.counts import announcement

if TYPE_CHECKING:
    from proteus_pipeline.models.architecture import Architecture
    from proteus_pipeline.stores.live import Announcement

# A copy is kept compressed where unpacking it takes less than this share of what its source took.
_WORTH = 0.8
# No thread unpacks faster, so that a sample need not be compressed to know that a source is: bytes a second.
_FASTEST_UNPACKING = 4e9


class Holdings:
    """Models in memory, within a budget. Verbs, retiring and packing take the lock; all else is called by who has it."""

    def __init__(self, settings: CacheSettings, *, device: str, precision: str) -> None:
        self.device, self.precision = device, precision
        self.settings = settings
        self.counts = Counts()
        keep_large_arrays_apart()
        policy = make_policy(settings.eviction_policy, ttl=settings.ttl)
        self._budget = Budget(*settings.limit(device), policy)
        self._residents: dict[str, Resident] = {}
        self._packed: dict[str, tuple[Packed, float]] = {}
        self._changed = threading.Condition(threading.RLock())
        self._drops = 0
        self._leases = 0
        # Filled as encoders are collected, in whichever thread and moment that happens: so without a lock.
        self._gone: deque[int] = deque()
        self._tokens = itertools.count()
        self._announcement: Announcement | None = None

    def peek(self, digest: str) -> bool:
        """Say whether a model is in memory, and count that as a request."""
        with self._expiring():
            found = self._sound(digest) is not None
            if found:
                self._use(digest)
            self.counts.asked(hit=found)
        return found

    def configure(self, changes: Mapping[str, Any]) -> CacheSettings:
        """Change settings, letting go what no longer fits; return all that are now in force.

        Raises
        ------
        ConfigError
            As `CacheSettings.changed`; all stays as it was.
        CacheMemoryError
            When models in use do not fit; likewise.

        """
        with self._changed:
            settings = self.settings.changed(changes)
            limit, limited_by = settings.limit(self.device)
            policy = make_policy(settings.eviction_policy, ttl=settings.ttl)
            self._settle()
            b = self._budget
            rooms = {d: self._room(r.encoder.architecture, settings) for d, r in self._residents.items()}
            new = replace(b, limit=limit, limited_by=limited_by, policy=policy, rooms=b.rooms | rooms)
            if (least := new.total(kept=self._in_use())) > limit:
                raise CacheMemoryError(
                    f"models in use take {megabytes(least)}, and the new limit is {megabytes(limit)}",
                    "end their leases first, or set a larger limit; the old settings stand",
                )
            policy.take_over(b.policy)
            self.settings, self._budget = settings, new
            for digest in list(self._packed) if not settings.compression else new.dropped_copies(NOTHING):
                self._drop_copy(digest)
            removed = self._evict(NOTHING, "shrunk")
        self._retire(removed)
        return settings

    def stats(self) -> dict[str, Any]:
        """Return counters, and bytes by device and kind."""
        with self._expiring():
            b = self._budget
            return self.counts.as_mapping() | {
                "leases": self._leases,
                "models": dict(b.held),
                "compressed": dict(b.compressed),
                "bytes": b.total(),
                "limit_bytes": b.limit,
                "limited_by": b.limited_by,
                "devices": {
                    self.device: {f"{kind}_bytes": count for kind, count in b.by_kind().items()}
                    | {"limit_bytes": b.limit}
                },
            }

    @contextmanager
    def _expiring(self) -> Iterator[None]:
        """Hold the lock, with the books up to date and what is too old gone."""
        with self._changed:
            expired, in_use = self._budget.policy.expired(time.monotonic()), self._in_use()
            removed = [self._remove(digest, "expired") for digest in expired if digest not in in_use]
        self._retire(removed)
        with self._changed:
            self._settle()
            yield

    def _sound(self, digest: str) -> Resident | None:
        """Return a model that is here; one whose file was written to is let go, so that it is loaded, and checked, anew."""
        resident = self._residents.get(digest)
        try:
            if resident is not None:
                resident.encoder.check_files()
        except IntegrityError:
            self._remove(digest, "invalidated")
            return None
        return resident

    def _lease(self, resident: Resident, count: int = 1) -> None:
        resident.leases += count
        self._leases += count

    def _measure(self, resident: Resident) -> None:
        """Enter what a model grew by: rotary tables of a longer protein than any before, a head."""
        if self._residents.get(resident.digest) is resident and resident.encoder.nbytes != resident.nbytes:
            resident.nbytes = self._budget.held[resident.digest] = resident.encoder.nbytes
            self._budget.policy.resized(resident.digest, resident.nbytes)

    def _use(self, digest: str) -> None:
        self._budget.policy.used(digest, time.monotonic())

    def _in_use(self) -> set[str]:
        return {digest for digest, resident in self._residents.items() if resident.leases}

    def _evict(self, wanted: Wanted, cause: str, kept: Collection[str] | None = None) -> list[Resident]:
        now = time.monotonic()
        expired = set(self._budget.policy.expired(now))
        chosen = self._budget.evictions(wanted, now, self._in_use() if kept is None else kept)
        return [self._remove(digest, "expired" if digest in expired else cause) for digest in chosen]

    def _remove(self, digest: str, cause: str) -> Resident:
        """Serve a model no more; its bytes count until the last who computes with it is done."""
        resident = self._residents.pop(digest)
        forget = self._budget.policy.removed if cause in {"invalidated", "cleared"} else self._budget.policy.evicted
        forget(digest)
        token = next(self._tokens)
        self._budget.freeing[token] = self._budget.held.pop(digest)
        self._budget.rooms.pop(digest, None)
        resident.when_freed(partial(self._gone.append, token))
        self.counts.let_go(cause, time.monotonic() - resident.since)
        self._announce()
        return resident

    def _announce(self) -> None:
        """Say what is held, to whoever watches this process's project."""
        self._announcement = self._announcement or announcement()
        if self._announcement:
            held = {f"{self.device} {kind}": count for kind, count in self._budget.by_kind().items()}
            self._announcement.say(held | {f"{self.device} limit": self._budget.limit})

    def _settle(self) -> None:
        """Enter in the books what was collected."""
        while self._gone:
            self._budget.freeing.pop(self._gone.popleft(), None)

    def _retire(self, removed: list[Resident], wanted: Wanted = NOTHING) -> None:
        """Let go of models, and keep compressed those that are worth it; nothing else here holds them."""
        while removed:
            resident = removed.pop()
            usable = self.settings.compression and self.device == "cpu" and not resident.leases and not resident.lent
            if usable and resident.seconds * _FASTEST_UNPACKING * thread_count() > resident.nbytes:
                self._pack(resident, wanted)

    def _pack(self, resident: Resident, wanted: Wanted) -> None:
        """Keep a copy of a model, where it would be unpacked sooner than its source is loaded, as measured, and has room."""
        digest, seconds, nbytes = resident.digest, resident.seconds, resident.nbytes
        # In fp32 a tensor is freed as its copy is made; else all are there twice, see Packed, and the copy beside them.
        beside = 0 if self.precision == "fp32" else 2 * nbytes
        token, packed = next(self._tokens), None
        try:
            with self._changed:
                self._settle()
                drops = self._drops
                if self._budget.total(wanted) + beside > self._budget.limit:
                    return
                self._budget.freeing[token] = beside
            share, seconds_a_byte = measure(resident.encoder)
            with self._changed:
                has_room = self._budget.total(wanted) + (share - 1) * nbytes <= self._budget.limit
            if has_room and seconds_a_byte * nbytes < _WORTH * seconds:
                packed = Packed(resident.encoder)
                resident.encoder.check_files()  # while its numbers were copied
        except IntegrityError:
            packed = None
        finally:
            del resident.encoder  # its bytes are off the books before the copy's are on them
            with self._changed:
                self._settle()
                self._budget.freeing.pop(token, None)
                if packed and drops == self._drops and self.settings.compression and digest not in self._residents:
                    self._keep(digest, packed, seconds, wanted)
                del packed
                give_back()  # before anybody else has room

    def _keep(self, digest: str, packed: Packed, seconds: float, wanted: Wanted) -> None:
        """Enter a copy, unless others have loaded meanwhile and there is no room for it any more."""
        if self._budget.total(wanted) + packed.nbytes <= self._budget.limit:
            self._packed[digest] = packed, seconds
            self._budget.compressed[digest] = packed.nbytes

    def _drop_copy(self, digest: str) -> None:
        self._packed.pop(digest, None)
        self._budget.compressed.pop(digest, None)

    def _room(self, architecture: Architecture, settings: CacheSettings) -> int:
        """Return what a usual call takes."""
        tokens = settings.tokens_per_batch
        return Call.usual(tokens, self.device).nbytes(architecture, tokens, self.device)
