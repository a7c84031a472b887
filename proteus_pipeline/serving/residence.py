"""Models in one device's memory: loaded once however many ask, within a budget, and never let go while somebody computes.

One lock guards the books. Loading, compressing and computing happen outside of it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import CacheMemoryError, StorageError
from proteus_pipeline.eviction.policies import make_policy
from proteus_pipeline.models.encoder import Encoder, make_encoder, weight_bytes
from proteus_pipeline.models.memory import give_back, keep_large_arrays_apart
from proteus_pipeline.serving.budget import NOTHING, Budget, Wanted, megabytes
from proteus_pipeline.serving.calls import Call
from proteus_pipeline.serving.compressed import Packed, measure
from proteus_pipeline.serving.flights import Flight, Flights
from proteus_pipeline.serving.resident import Resident
from proteus_pipeline.serving.settings import CacheSettings
from proteus_pipeline.serving.statistics import Counts

if TYPE_CHECKING:
    from proteus_pipeline.models.architecture import Architecture
    from proteus_pipeline.serving.bindings import Binding

_TICK = 0.05  # how often a load that waits for room looks again, seconds
# A copy is kept compressed where unpacking it takes less than this share of what its source took.
_WORTH = 0.8
# Nothing here is unpacked faster, so that a sample need not be compressed to know that a source is: bytes a second.
_FASTEST_UNPACKING = 4e9


class Residence:
    """The models of one device; see `proteus_pipeline.ModelCacheManager` for what each verb promises."""

    def __init__(self, settings: CacheSettings, *, device: str, precision: str, numerics: str) -> None:
        self.device, self.precision, self.numerics = device, precision, numerics
        self.settings = settings
        self.counts = Counts()
        keep_large_arrays_apart()
        policy = make_policy(settings.eviction_policy, ttl=settings.ttl)
        self._budget = Budget(*settings.limit(device), policy)
        self._residents: dict[str, Resident] = {}
        self._packed: dict[str, tuple[Packed, float]] = {}
        self._flights: Flights[Resident] = Flights()
        self._changed = threading.Condition(threading.RLock())
        # Filled as encoders are collected, in whichever thread and moment that happens: so without a lock.
        self._gone: deque[int] = deque()
        self._tokens = itertools.count()

    def peek(self, digest: str) -> bool:
        """Say whether a model is in memory, and count that as a request."""
        with self._expiring():
            found = digest in self._residents
            if found:
                self._use(digest)
            else:
                self.counts.misses += 1
        return found

    @contextmanager
    def leased(self, binding: Binding) -> Iterator[Resident]:
        """Load a model, unless it is here, and keep it here meanwhile.

        Raises
        ------
        CacheMemoryError
            When it is larger than the budget, or leases leave no room for it in time.
        ProteusError
            What its load raised.

        """
        resident = self._acquire(binding)
        try:
            yield resident
        finally:
            self._release(resident)

    @contextmanager
    def computing(self, binding: Binding, call: Call) -> Iterator[Encoder]:
        """Lease a model for one call, with room for what the call takes.

        Raises
        ------
        CacheMemoryError
            As `leased`, and where the call has no room, or other calls leave none in time.
        ProteusError
            As `leased`.

        """
        with self.leased(binding) as resident:
            nbytes = self._call_bytes(resident.encoder.architecture, call)
            token = next(self._tokens)
            with self._changed:
                weights = self._budget.held.get(binding.digest, 0)
            what = f"a call of {binding.reference} with {call} takes {megabytes(nbytes)} beside {megabytes(weights)} of weights"
            begin = partial(self._budget.calls.__setitem__, token, nbytes)
            try:
                self._make_room(what, weights + nbytes, Wanted(call=nbytes), begin)
                yield resident.encoder
            finally:
                with self._changed:
                    self._budget.calls.pop(token, None)
                    self._changed.notify_all()
                give_back()  # a millisecond; without, 32 threads that compute kept 40 MB of what they had freed

    def drop(self, digests: Collection[str] | None, cause: str) -> int:
        """Serve some models no more, or all; return how many were here. Their memory comes back with their last lease."""
        with self._changed:
            chosen = [d for d in self._residents if digests is None or d in digests]
            for digest in [d for d in self._packed if digests is None or d in digests]:
                self._drop_copy(digest)
            for digest in chosen:
                self._remove(digest, cause)
        give_back()
        return len(chosen)

    def configure(self, settings: CacheSettings) -> None:
        """Apply settings, letting go what no longer fits.

        Raises
        ------
        CacheMemoryError
            When models in use do not fit; all stays as it was.

        """
        limit, limited_by = settings.limit(self.device)
        policy = make_policy(settings.eviction_policy, ttl=settings.ttl)
        with self._changed:
            self._settle()
            b, before = self._budget, self.settings
            self.settings = settings
            rooms = {d: self._room(r.encoder.architecture) for d, r in self._residents.items()}
            new = replace(b, limit=limit, limited_by=limited_by, policy=policy, rooms=b.rooms | rooms)
            if (least := new.total(kept=self._in_use())) > limit:
                self.settings = before
                raise CacheMemoryError(
                    f"models in use take {megabytes(least)}, and the new limit is {megabytes(limit)}",
                    "end their leases first, or set a larger limit; the old settings stand",
                )
            policy.take_over(b.policy)
            b.policy, b.limit, b.limited_by, b.rooms = policy, limit, limited_by, new.rooms
            for digest in list(self._packed) if not settings.compression else b.dropped_copies(NOTHING):
                self._drop_copy(digest)
            removed = self._evict(NOTHING, "shrunk")
        self._retire(removed)

    def stats(self) -> dict[str, Any]:
        """Return counters, and bytes by device and kind."""
        with self._expiring():
            b = self._budget
            return self.counts.as_mapping() | {
                "leases": sum(r.leases for r in self._residents.values()),
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

    def _acquire(self, binding: Binding) -> Resident:
        digest = binding.digest
        with self._expiring():
            resident = self._residents.get(digest)
            if resident is not None:
                self._use(digest)
                resident.leases += 1
                return resident
            self.counts.misses += 1
            flight, mine = self._flights.join(digest)
        return self._fly(binding, flight) if mine else self._wait(flight)

    def _wait(self, flight: Flight[Resident]) -> Resident:
        try:
            return flight.done.result()
        except KeyboardInterrupt:
            with self._changed:
                if flight.done.done() and not flight.done.exception():
                    self._release(flight.done.result())  # the lease that was kept for this thread
                else:
                    flight.waiting -= 1
            raise

    def _fly(self, binding: Binding, flight: Flight[Resident]) -> Resident:
        """Load a model for all who wait for it."""
        digest = binding.digest
        try:
            encoder, seconds, restored = self._load(binding)
        except BaseException as error:
            told = error if isinstance(error, Exception) else StorageError(
                f"the load of {binding.reference} was interrupted", "ask again"
            )  # fmt: skip
            with self._changed:
                self._budget.reserved.pop(digest, None)
                self._budget.rooms.pop(digest, None)
                self.counts.failures += 1
                # There may be room a moment later.
                self._flights.failed(digest, told, pause=not isinstance(told, CacheMemoryError))
                self._changed.notify_all()
            flight.done.set_exception(told)
            raise
        with self._changed:
            now = time.monotonic()
            nbytes = encoder.nbytes
            resident = Resident(digest, encoder, nbytes, seconds, now, 1 + flight.waiting)
            self._budget.reserved.pop(digest, None)
            self._budget.held[digest] = nbytes
            self._budget.policy.added(digest, nbytes, seconds, now)
            self._residents[digest] = resident
            self._flights.landed(digest)
            self.counts.restored += restored
            self.counts.loads += not restored
            removed = self._evict(NOTHING, "room")  # it may be a little larger than was thought
        flight.done.set_result(resident)
        self._retire(removed)
        return resident

    def _load(self, binding: Binding) -> tuple[Encoder, float, bool]:
        """Return an encoder, what its source took to load, and whether it was a compressed copy."""
        began = time.perf_counter()
        with self._changed:
            packed, seconds = self._packed.pop(binding.digest, (None, 0.0))
            kept = self._budget.compressed.pop(binding.digest, 0)
        if packed is not None:
            self._make_room_to_load(binding, packed.architecture, packed.raw_bytes + kept)
            encoder: Encoder = packed.unpack()
        else:
            checkpoint = binding.open()
            need = weight_bytes(checkpoint.architecture, self.precision) + checkpoint.nbytes
            self._make_room_to_load(binding, checkpoint.architecture, need)
            encoder = make_encoder(checkpoint, precision=self.precision, numerics=self.numerics, device=self.device)
            seconds = time.perf_counter() - began
        self.counts.load_seconds.append(time.perf_counter() - began)
        return encoder, seconds, packed is not None

    def _make_room_to_load(self, binding: Binding, architecture: Architecture, need: int) -> None:
        room = self._room(architecture)

        def enter() -> None:
            self._budget.reserved[binding.digest] = need
            self._budget.rooms[binding.digest] = room

        what = f"{binding.reference} takes {megabytes(need)} and a usual call with it {megabytes(room)}"
        self._make_room(what, need + room, Wanted(load=need, room=room), enter)

    def _make_room(self, what: str, alone: int, wanted: Wanted, enter: Callable[[], None]) -> None:
        """Let go what has to go for what is wanted, waiting for what is in use, and enter it in the books.

        `what` says what takes which bytes; `alone` is all that the books would hold if there were nothing else.
        """
        deadline = time.monotonic() + self.settings.patience
        while True:
            with self._changed:
                self._settle()
                b = self._budget
                if alone > b.limit:
                    raise b.too_large(what, alone)
                removed: list[Resident] = []
                if b.total(wanted, self._in_use()) <= b.limit:
                    for digest in b.dropped_copies(wanted):
                        self._drop_copy(digest)
                    removed = self._evict(wanted, "room")
                    if b.total(wanted) <= b.limit:
                        enter()
                        return
                elif time.monotonic() > deadline:
                    raise b.no_room(what, self._in_use())
                else:
                    self._changed.wait(_TICK)
            self._retire(removed, wanted)

    def _release(self, resident: Resident) -> None:
        with self._changed:
            resident.leases -= 1
            removed = self._evict(NOTHING, "shrunk") if not resident.leases else []
            self._changed.notify_all()
        self._retire(removed)

    def _use(self, digest: str) -> None:
        self.counts.hits += 1
        self._budget.policy.used(digest, time.monotonic())

    def _in_use(self) -> set[str]:
        return {digest for digest, resident in self._residents.items() if resident.leases}

    def _evict(self, wanted: Wanted, cause: str) -> list[Resident]:
        now = time.monotonic()
        expired = set(self._budget.policy.expired(now))
        chosen = self._budget.evictions(wanted, now, self._in_use())
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
        self.counts.evictions[cause] += 1
        self.counts.ages.append(time.monotonic() - resident.since)
        return resident

    def _settle(self) -> None:
        """Enter in the books what was collected."""
        while self._gone:
            self._budget.freeing.pop(self._gone.popleft(), None)

    def _retire(self, removed: list[Resident], wanted: Wanted = NOTHING) -> None:
        """Let go of models, and keep compressed those that are worth it; nothing else here holds them."""
        while removed:
            resident = removed.pop()
            usable = self.settings.compression and self.device == "cpu" and not resident.leases and not resident.lent
            if usable and resident.seconds * _FASTEST_UNPACKING > resident.nbytes:
                self._pack(resident, wanted)

    def _pack(self, resident: Resident, wanted: Wanted) -> None:
        """Keep a copy of a model, where it would be unpacked sooner than its source is loaded, as measured, and has room."""
        digest, seconds, nbytes = resident.digest, resident.seconds, resident.nbytes
        # In fp32 a tensor is freed as its copy is made; else all are there twice, see Packed, and the copy beside them.
        beside = 0 if self.precision == "fp32" else 2 * nbytes
        with self._changed:
            self._settle()
            if self._budget.total(wanted) + beside > self._budget.limit:
                return
            token = next(self._tokens)
            self._budget.freeing[token] = beside
        packed = None
        try:
            share, seconds_a_byte = measure(resident.encoder)
            with self._changed:
                has_room = self._budget.total(wanted) + (share - 1) * nbytes <= self._budget.limit
            if has_room and seconds_a_byte * nbytes < _WORTH * seconds:
                packed = Packed(resident.encoder, resident.encoder.architecture)
        finally:
            del resident.encoder  # its bytes are off the books before the copy's are on them
            with self._changed:
                self._settle()
                del self._budget.freeing[token]
                if packed and digest not in self._residents:
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

    def _room(self, architecture: Architecture) -> int:
        """Return what a usual call takes."""
        return self._call_bytes(architecture, Call.usual(self.settings.tokens_per_batch, self.device))

    def _call_bytes(self, architecture: Architecture, call: Call) -> int:
        return call.nbytes(architecture, self.settings.tokens_per_batch, self.device)
