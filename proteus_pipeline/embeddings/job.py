"""Misses into segments: computed, written and published as they come; several processes that miss the same share the work."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proteus_pipeline.embeddings.computing import Computed, Embedded, Progress, compute, spans_of, tokens_of
from proteus_pipeline.embeddings.hot import HotRun, Offered
from proteus_pipeline.embeddings.index import Attestation, now
from proteus_pipeline.embeddings.leases import Lease
from proteus_pipeline.embeddings.publication import Publication
from proteus_pipeline.embeddings.recipe import Recipe, windows
from proteus_pipeline.errors import StorageError
from proteus_pipeline.models.memory import give_back, keep_large_arrays_apart
from proteus_pipeline.stores.counts import count

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.embeddings.found import Entry
    from proteus_pipeline.models.encoder import Encoder

# A crash loses what is not yet published: at most this many bytes, or this many seconds of work.
PUBLISH_BYTES = 128 << 20
PUBLISH_SECONDS = 60.0
# Computed and not yet written: beyond this the encoder waits for the disk.
_QUEUE_BYTES = 16 << 20
# Kept of a segment until it is published, for Redis.
_OFFERED_BYTES = 32 << 20
# How often freed memory is given back, at most: it takes a millisecond.
_GIVEN_BACK_S = 0.1
# What a run claims at a time: little enough that others find work, enough that batches are full.
_PORTIONS, _PORTION_TOKENS = 16, 32_768
# How long to wait where other runs are at all that is left, seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
# After how long, and how often then, it is said what is waited for.
_PATIENCE, _LONG_PATIENCE = 30.0, 600.0
_log = logging.getLogger(__name__)


@dataclass
class _Lot:
    """A segment in the making: noted by the thread that computes, written and published by another.

    What is noted is in one place until it is written, so that Ctrl-C never finds an entry half noted. Who writes has the lock: after
    a second Ctrl-C nobody may have waited for the other thread.
    """

    waiting: deque[Computed] = field(default_factory=deque)
    publication: Publication | None = None
    since: float = field(default_factory=time.perf_counter)
    noted_bytes: int = 0
    written_bytes: int = 0
    tokens: int = 0
    keys: list[str] = field(default_factory=list)
    offered: list[Offered] = field(default_factory=list)
    published: bool = False
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, computed: Computed) -> None:
        self.noted_bytes += computed.array.nbytes
        self.waiting.append(computed)

    def close(self) -> None:
        """Leave nothing behind of a segment that was not published."""
        with self.lock:
            self.closed = True
            if self.publication:
                self.publication.discard()

    @property
    def backlog(self) -> int:
        return self.noted_bytes - self.written_bytes

    @property
    def due(self) -> bool:
        late = time.perf_counter() - self.since >= PUBLISH_SECONDS
        return self.noted_bytes >= PUBLISH_BYTES or (late and bool(self.noted_bytes))


@dataclass
class Job:
    """Embeddings to compute, of one recipe by one encoder.

    Attributes
    ----------
    trunk, recipe
        What is computed.
    cache
        Where it goes.
    encoder
        Over the weights.
    attested
        Device class and torch's version.
    token_budget
        Tokens in one pass.
    lease
        This run's, by which other runs know what it is computing.
    progress
        Told how far the work is.
    hot
        Where pooled vectors go too, once they are published.

    """

    trunk: str
    recipe: Recipe
    cache: EmbeddingCache
    encoder: Encoder
    attested: tuple[str, str]
    token_budget: int
    lease: Lease
    progress: Progress | None
    hot: HotRun | None = None
    _shapes: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)

    def run(self, missing: dict[str, str], done: dict[str, Embedded]) -> list[Entry]:
        """Compute what is missing, and publish it as it comes; return what other runs computed in the meantime.

        Parameters
        ----------
        missing
            Sequences by key.
        done
            Given what a manifest says of each.

        Raises
        ------
        StorageError
            When the cache can't be read or written.

        """
        theirs: list[Entry] = []
        pause, waited = _FIRST_PAUSE, 0.0
        left = missing
        while left:
            # All is published when this returns: whoever waits for it finds it.
            claimed = self._compute_unclaimed(self._portions(left), done, theirs)
            if len(claimed) == len(left):
                waited += pause
                if waited > _PATIENCE:
                    _log.warning(
                        "waiting for %d embeddings that another run is computing in %s", len(claimed), self.cache.path
                    )
                    waited = -_LONG_PATIENCE
                time.sleep(pause)  # others are at all that is left
                pause = min(2 * pause, _LONGEST_PAUSE)
            left = claimed
        return theirs

    def _portions(self, missing: Mapping[str, str]) -> deque[dict[str, str]]:
        """Return sequences as they are claimed: the longest first, so many at a time that several runs find work."""
        ordered = sorted(missing, key=lambda key: -len(missing[key]))
        tokens = {key: tokens_of(spans_of(missing[key], self.recipe)) for key in ordered}
        most = min(max(sum(tokens.values()) // _PORTIONS, 2 * self.token_budget), _PORTION_TOKENS)
        portions: deque[dict[str, str]] = deque()
        room = 0
        for key in ordered:
            if room <= 0:
                portions.append({})
                room = most
            portions[-1][key] = missing[key]
            room -= tokens[key]
        return portions

    def _compute_unclaimed(
        self, portions: deque[dict[str, str]], done: dict[str, Embedded], theirs: list[Entry]
    ) -> dict[str, str]:
        """Compute and publish what no other run is at; return what others have claimed."""
        claimed: dict[str, str] = {}
        lots = [_Lot()]
        # Compression and the disk have a thread of their own, so that neither holds the encoder; one lot at a time.
        with ThreadPoolExecutor(1, "publisher") as publisher:
            flying: deque[Future[None]] = deque()
            try:
                for computed in self._mine(portions, done, theirs, claimed):
                    lots[-1].note(computed)
                    if self.progress:
                        self.progress.advance(1, computed.tokens, self._flops(computed.length))
                    full = lots[-1].due or lots[-1].backlog > _QUEUE_BYTES
                    while flying and (full or flying[0].done()):
                        flying.popleft().result()
                    if lots[-1].due:
                        lots[:] = [lots[-1], _Lot()]
                        flying.append(publisher.submit(self._publish, lots[0], done))
                    else:
                        flying.append(publisher.submit(self._write, lots[-1], done))
                for future in flying:
                    future.result()
                self._publish_all(lots, done)
            except BaseException as error:
                self._keep(publisher, lots, done, error)
                raise
            finally:
                for lot in lots:
                    lot.close()
        return claimed

    def _mine(
        self,
        portions: deque[dict[str, str]],
        done: dict[str, Embedded],
        theirs: list[Entry],
        claimed: dict[str, str],
    ) -> Iterator[Computed]:
        """Yield the embeddings of each portion, but for what another run has published or is computing."""
        while portions:
            portion = portions.popleft()
            mine = self.lease.claim(portion)
            claimed |= {key: portion[key] for key in portion.keys() - mine}
            for entry, _ in self.cache.find(portion) if len(mine) < len(portion) or self.lease.shared() else ():
                done[entry.key] = Embedded(entry.key, entry.shape, entry.stored, entry.content)
                theirs.append(entry)
                mine.discard(entry.key)
                claimed.pop(entry.key, None)
                self.lease.release([entry.key])
            left = {key: sequence for key, sequence in portion.items() if key in mine}
            if left:
                yield from _giving_back(compute(self.encoder, self.recipe, left, self.token_budget))

    def _keep(
        self, publisher: ThreadPoolExecutor, lots: list[_Lot], done: dict[str, Embedded], error: BaseException
    ) -> None:
        """Publish what is finished, after Ctrl-C or an error, in publishing too. An entry published twice does no harm."""
        self.hot = None  # who has pressed Ctrl-C waits for the disk alone
        try:
            publisher.shutdown()
        finally:
            try:
                self._publish_all(lots, done)
            except StorageError as failed:
                error.add_note(f"and what was finished could not be kept: {failed}")

    def _publish_all(self, lots: list[_Lot], done: dict[str, Embedded]) -> None:
        for lot in lots:
            self._publish(lot, done)

    def _flops(self, length: int) -> float:
        spans = windows(length, self.recipe.window, self.recipe.overlap)
        return sum(self.encoder.flops(end - start) for start, end in spans)

    def _write(self, lot: _Lot, done: dict[str, Embedded]) -> None:
        """Write what is noted to the lot's segment."""
        with lot.lock:
            self._write_noted(lot, done)

    def _write_noted(self, lot: _Lot, done: dict[str, Embedded]) -> None:
        while lot.waiting and not lot.closed:
            computed = lot.waiting[0]
            if lot.publication is None:
                lot.publication = self.cache.begin(self.trunk, self.recipe)
            content = lot.publication.add(computed.key, computed.array, computed.length, computed.start)
            shape = self._shapes.setdefault(computed.array.shape, computed.array.shape)  # pooled, one for all
            done[computed.key] = Embedded(computed.key, shape, self.recipe.stored, content)
            lot.tokens += computed.tokens
            lot.keys.append(computed.key)
            lot.written_bytes += computed.array.nbytes
            if self.hot and lot.written_bytes <= _OFFERED_BYTES:
                lot.offered.append(Offered(computed.key, computed.array, computed.length))
            lot.waiting.popleft()

    def _publish(self, lot: _Lot, done: dict[str, Embedded]) -> None:
        """Write what is noted, and publish it; at most once."""
        with lot.lock:
            if lot.published or lot.closed:
                return
            self._write_noted(lot, done)
            if lot.publication is None:
                return
            device_class, torch_version = self.attested
            seconds = round(time.perf_counter() - lot.since, 6)
            header = lot.publication.publish(Attestation(device_class, torch_version, now(), seconds, lot.tokens))
            lot.published = True
        count("proteus_embedding_tokens_total", lot.tokens)
        count("proteus_embedding_compute_seconds", seconds)
        self.lease.release(lot.keys)
        self.cache.tidy()
        if hot := self.hot:
            hot.offer(header, lot.offered)
        lot.offered.clear()


def _giving_back(results: Iterator[Computed]) -> Iterator[Computed]:
    """Yield what comes, and give freed memory back to the system on the way.

    Otherwise 2,500 proteins take 9% more memory at the peak than 100 (one block of the 8M shape, means), and with this 5%, in the
    same time.
    """
    keep_large_arrays_apart()
    since = time.monotonic()
    for computed in results:
        yield computed
        if time.monotonic() - since > _GIVEN_BACK_S:
            give_back()
            since = time.monotonic()
