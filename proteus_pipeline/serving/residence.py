"""Models in one device's memory: loaded once however many ask, within a budget, and never let go while somebody computes.

Loading and computing happen outside of the lock that guards what is held (`proteus_pipeline.serving.holdings`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from proteus_pipeline.errors import CacheMemoryError, IntegrityError, StorageError
from proteus_pipeline.models.encoder import Encoder, make_encoder, weight_bytes
from proteus_pipeline.models.memory import give_back
from proteus_pipeline.serving.budget import NOTHING, Wanted, megabytes
from proteus_pipeline.serving.calls import Call
from proteus_pipeline.serving.flights import Flight, Flights
from proteus_pipeline.serving.holdings import Holdings
from proteus_pipeline.serving.queue import Place, Queue
from proteus_pipeline.serving.resident import Resident
from proteus_pipeline.serving.settings import CacheSettings

if TYPE_CHECKING:
    from proteus_pipeline.models.architecture import Architecture
    from proteus_pipeline.serving.bindings import Binding

_TICK = 0.05  # how often what waits for room looks again, seconds


class Residence(Holdings):
    """The models of one device; see `proteus_pipeline.ModelCacheManager` for what each verb promises."""

    def __init__(
        self,
        settings: CacheSettings,
        *,
        device: str,
        precision: str,
        numerics: str,
        turn: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        super().__init__(settings, device=device, precision=precision)
        self._turn = turn or (lambda _: nullcontext())
        self.numerics = numerics
        self._flights: Flights[Resident] = Flights()
        self._queue = Queue()

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
        with self._queue.place(self.settings.patience) as place:
            resident = self._acquire(binding, place, counted=True)
        try:
            with self._changed:
                resident.promised += 1
            yield resident
        finally:
            with self._changed:
                resident.promised -= 1
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
        token = next(self._tokens)
        resident = None
        try:
            with self._queue.place(self.settings.patience) as place:
                while resident is None:
                    loaded = self._acquire(binding, place)
                    nbytes = self._call_bytes(loaded.encoder.architecture, call)
                    self._release(loaded)  # what waits holds nothing that others wait for
                    del loaded
                    resident = self._begin(binding, call, token, nbytes, place)
                    if resident is None:
                        place.insist()  # another took its model's room: not twice
            yield resident.encoder
        except IntegrityError:
            with self._changed:
                self._sound(binding.digest)
            raise
        finally:
            with self._changed:
                self._budget.calls.pop(token, None)
                if resident is not None:
                    self._measure(resident)
                self._announce()
            if resident is not None:
                self._release(resident)
            give_back()  # a millisecond; without, 32 threads that compute kept 40 MB of what they had freed

    @contextmanager
    def beside(self, what: str, architecture: Architecture, precision: str, call: Call) -> Iterator[None]:
        """Keep room for a call with an encoder of its own, which goes with it.

        Raises
        ------
        CacheMemoryError
            Where it has none.

        """
        token = next(self._tokens)
        nbytes = weight_bytes(architecture, precision, self.device) + self._call_bytes(architecture, call)
        said = f"a call of {what} in {precision}, which is not the cache's, takes {megabytes(nbytes)}"
        try:
            with self._queue.place(self.settings.patience) as place:
                enter = partial(self._budget.calls.__setitem__, token, nbytes)
                self._make_room(said, nbytes, Wanted(call=nbytes), enter, place)
            yield
        finally:
            with self._changed:
                self._budget.calls.pop(token, None)
                self._changed.notify_all()

    def drop(self, digests: Collection[str] | None, cause: str) -> int:
        """Serve some models no more, or all; return how many were here. Their memory comes back with their last lease."""
        with self._changed:
            self._drops += 1
            chosen = [d for d in self._residents if digests is None or d in digests]
            for digest, flight in self._flights.under_way.items():
                if digests is None or digest in digests:
                    flight.dropped = cause  # who waits for it may compute with it; nobody after them
            for digest in [d for d in self._packed if digests is None or d in digests]:
                self._drop_copy(digest)
            for digest in chosen:
                self._remove(digest, cause)
        give_back()
        return len(chosen)

    def _acquire(self, binding: Binding, place: Place, *, counted: bool = False) -> Resident:
        """Return a model with a lease on it; `counted` says whether this is a request of its own."""
        digest = binding.digest
        flight, mine = None, False
        try:
            with self._expiring():
                resident = self._sound(digest)
                if counted:
                    self.counts.asked(hit=resident is not None)
                if resident is not None:
                    self._use(digest)
                    self._lease(resident)
                    return resident
                flight, mine = self._flights.join(digest, binding.reference)
            if mine:
                return self._fly(binding, place)
            place.first = False  # it is somebody else who does what this one waits for
            return flight.result()
        except BaseException as error:
            if flight is not None:
                self._leave(binding, flight, error, mine=mine)
            raise

    def _leave(self, binding: Binding, flight: Flight[Resident], error: BaseException, *, mine: bool) -> None:
        """End what a thread had of a load that gave it nothing: all of the load if it was its own, else its place in it."""
        with self._changed:
            landed = flight.landed
            if landed is not None:
                self._release(landed)  # the lease that was counted for this thread
            elif not mine:
                flight.waiting -= 1
            else:
                told = error if isinstance(error, Exception) else StorageError(
                    f"the load of {binding.reference} was interrupted", "ask again"
                )  # fmt: skip
                self._budget.reserved.pop(binding.digest, None)
                self._budget.rooms.pop(binding.digest, None)
                self.counts.failed()
                # There may be room a moment later, and nothing was wrong with what was interrupted.
                lasting = told is error and not isinstance(error, CacheMemoryError)
                self._flights.fail(binding.digest, binding.reference, told, pause=lasting)
                flight.done.set_exception(told)
            self._changed.notify_all()
        if mine and landed is not None and not flight.done.done():
            flight.done.set_result(landed)

    def _fly(self, binding: Binding, place: Place) -> Resident:
        """Load a model for all who wait for it."""
        digest = binding.digest
        encoder, seconds, restored = self._load(binding, place)
        with self._changed:
            now, flight = time.monotonic(), self._flights.under_way[digest]
            nbytes = encoder.nbytes
            resident = Resident(digest, encoder, nbytes, seconds, now)
            self._lease(resident, 1 + flight.waiting)
            self._budget.reserved.pop(digest, None)
            self._budget.held[digest] = nbytes
            self._budget.policy.added(digest, nbytes, seconds, now)
            self._residents[digest] = resident
            self._flights.land(digest, binding.reference, resident)
            self.counts.loaded(restored=restored)
            if flight.dropped:
                self._remove(digest, flight.dropped)
            removed = self._evict(NOTHING, "room")  # it may be a little larger than was thought
            self._announce()
        flight.done.set_result(resident)
        self._retire(removed)
        return resident

    def _load(self, binding: Binding, place: Place) -> tuple[Encoder, float, bool]:
        """Return an encoder, what its source took to load, and whether it was a compressed copy."""
        if restored := self._restore(binding, place):
            return *restored, True
        began = time.perf_counter()
        checkpoint = binding.open()
        opened = time.perf_counter() - began
        need = weight_bytes(checkpoint.architecture, self.precision, self.device) + checkpoint.nbytes
        self._make_room_to_load(binding, checkpoint.architecture, need, need, place)
        # What was waited for in between is not the source's.
        with self._turn(binding.digest):
            began = time.perf_counter()
            encoder = make_encoder(checkpoint, precision=self.precision, numerics=self.numerics, device=self.device)
            seconds = opened + time.perf_counter() - began
        self.counts.load_seconds.add(seconds)
        return encoder, seconds, False

    def _restore(self, binding: Binding, place: Place) -> tuple[Encoder, float] | None:
        """Return an encoder from its compressed copy, which goes with that; None where there is none, or no room for both."""
        with self._changed:
            self._settle()
            b, (packed, seconds) = self._budget, self._packed.get(binding.digest, (None, 0.0))
            if packed is None:
                return None
            kept = b.compressed[binding.digest]
            # Weights that are laid out for a kernel are there in their usual order too, until all are.
            need = packed.raw_bytes * (1 if self.precision == "fp32" else 2)
            room = self._room(packed.architecture, self.settings)
            self._drop_copy(binding.digest)
            if b.total(Wanted(load=need + kept, room=room), self._in_use()) > b.limit:
                return None
            # The copy counts on, as a part of this load.
            b.reserved[binding.digest], b.rooms[binding.digest] = kept, room
        self._make_room_to_load(binding, packed.architecture, need, need + kept, place)
        began = time.perf_counter()
        encoder: Encoder = packed.unpack()
        self.counts.load_seconds.add(time.perf_counter() - began)
        return encoder, seconds

    def _make_room_to_load(
        self, binding: Binding, architecture: Architecture, more: int, need: int, place: Place
    ) -> None:
        """Enter what a load needs in all, of which `more` is not in the books yet."""
        room = self._room(architecture, self.settings)

        def enter() -> None:
            self._budget.reserved[binding.digest] = need
            self._budget.rooms[binding.digest] = room

        what = f"{binding.reference} takes {megabytes(need)} and a usual call with it {megabytes(room)}"
        self._make_room(what, need + room, Wanted(load=more, room=room), enter, place)

    def _begin(self, binding: Binding, call: Call, token: int, nbytes: int, place: Place) -> Resident | None:
        """Return a model with a lease and room for a call, or None where it went meanwhile."""
        with self._changed:
            found = self._residents.get(binding.digest)
        if found is None:
            return None
        resident, begun = found, list[Resident]()

        def enter() -> None:
            self._budget.calls[token] = nbytes
            self._announce()
            begun.append(resident)
            self._lease(resident)

        weights = megabytes(resident.nbytes)
        what = f"a call of {binding.reference} with {call} takes {megabytes(nbytes)} beside {weights} of weights"
        self._make_room(what, resident.nbytes + nbytes, Wanted(call=nbytes), enter, place, needs=resident)
        return begun[0] if begun else None

    def _make_room(
        self,
        what: str,
        alone: int,
        wanted: Wanted,
        enter: Callable[[], None],
        place: Place,
        *,
        needs: Resident | None = None,
    ) -> None:
        """Let go what has to go for what is wanted, waiting for what is in use, and enter it in the books.

        `what` says what takes which bytes; `alone` is all that the books would hold if there were nothing else. Nothing is
        entered where the model that it `needs` went meanwhile.
        """
        deadline = time.monotonic() + self.settings.patience
        while True:
            with self._changed:
                self._settle()
                b = self._budget
                if alone > b.limit:
                    raise b.too_large(what, alone)
                if needs is not None and self._residents.get(needs.digest) is not needs:
                    return
                removed: list[Resident] = []
                its = {needs.digest} if needs else set()
                kept, promised = self._in_use() | its, {d for d, r in self._residents.items() if r.promised} | its
                next_one = place.is_next(feasible=b.at_last(wanted, promised) <= b.limit)
                if next_one and b.total(wanted, kept) <= b.limit:
                    for digest in b.dropped_copies(wanted):
                        self._drop_copy(digest)
                    removed = self._evict(wanted, "room", kept)
                    if b.total(wanted) <= b.limit:
                        enter()
                        return
                elif time.monotonic() > deadline:
                    raise b.no_room(what, kept)
                else:
                    self._changed.wait(_TICK)
            self._retire(removed, wanted)

    def _release(self, resident: Resident) -> None:
        with self._changed:
            self._lease(resident, -1)
            removed = self._evict(NOTHING, "shrunk") if not resident.leases else []
            self._changed.notify_all()
        self._retire(removed)

    def _call_bytes(self, architecture: Architecture, call: Call) -> int:
        return call.nbytes(architecture, self.settings.tokens_per_batch, self.device)
