"""Embeddings of some sequences: from the cache where they are known, through the encoder where they are not."""

from __future__ import annotations

import datetime as dt
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.deriving import derive
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.publication import Publication
from proteus_pipeline.embeddings.recipe import Recipe, windows
from proteus_pipeline.embeddings.stored import to_stored
from proteus_pipeline.errors import StorageError
from proteus_pipeline.models.encoder import Outputs
from proteus_pipeline.models.pooling import finite, pool, pool_residues

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.visible import Entry
    from proteus_pipeline.models.encoder import Encoder

    _Window = tuple[NDArray[np.float32], NDArray[np.float32] | None]

# A crash loses what is not yet published: at most this many bytes, or this many seconds of work.
PUBLISH_BYTES = 128 << 20
PUBLISH_SECONDS = 60.0
# Computed and not yet written: beyond this the encoder waits for the disk.
_QUEUE_BYTES = 16 << 20
# Measuring what the machine could do takes half a second.
_WORTH_MEASURING = 50_000


class Progress(Protocol):
    """Told how far the work is."""

    def start(self, total: int, hits: int, tokens: int, peak: float) -> None:
        """Work begins.

        Parameters
        ----------
        total, hits
            Distinct sequences in all, and how many of them the cache had.
        tokens
            To compute.
        peak
            The matrix products this machine was just measured to do, FLOP/s; 0 where that was not worth it.

        """

    def advance(self, sequences: int, tokens: int, flops: float) -> None:
        """Some more sequences were computed, of so many tokens and floating-point operations."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a manifest says of one embedding."""

    key: str
    shape: tuple[int, ...]
    stored: str
    content: str


@dataclass(frozen=True)
class Outcome:
    """What `embed` did.

    Attributes
    ----------
    entries
        One for each sequence asked for, in their order.
    sequences, unique, hits, derived, computed
        Counts; the last three add up to `unique`.
    tokens
        Tokens computed.
    seconds
        Wall time in all.
    saved_seconds
        What the hits took when they were computed.

    """

    entries: tuple[Embedded, ...]
    sequences: int
    unique: int
    hits: int
    derived: int
    computed: int
    tokens: int
    seconds: float
    saved_seconds: float


class _Computed(NamedTuple):
    """One embedding in its stored dtype, with the start token's vector, and the residues and tokens of its sequence."""

    key: str
    array: NDArray[np.generic]
    start: NDArray[np.generic] | None
    length: int
    tokens: int


@dataclass
class _Lot:
    """A segment in the making: noted by the thread that computes, written and published by another.

    What is noted is in one place until it is written, so that Ctrl-C never finds an entry half noted.
    """

    waiting: deque[_Computed] = field(default_factory=deque)
    publication: Publication | None = None
    since: float = field(default_factory=time.perf_counter)
    noted_bytes: int = 0
    written_bytes: int = 0
    tokens: int = 0
    published: bool = False

    def note(self, computed: _Computed) -> None:
        self.noted_bytes += computed.array.nbytes
        self.waiting.append(computed)

    def close(self) -> None:
        """Leave nothing behind of a segment that was not published."""
        if self.publication:
            self.publication.discard()

    @property
    def backlog(self) -> int:
        return self.noted_bytes - self.written_bytes

    @property
    def due(self) -> bool:
        late = time.perf_counter() - self.since >= PUBLISH_SECONDS
        return self.noted_bytes >= PUBLISH_BYTES or (late and bool(self.noted_bytes))


def embed(
    sequences: Sequence[str],
    *,
    trunk: str,
    recipe: Recipe,
    cache: EmbeddingCache,
    encoder: Callable[[], Encoder],
    attest: Callable[[], tuple[str, str]],
    token_budget: int = 2048,
    progress: Progress | None = None,
) -> Outcome:
    """Make sure that the cache holds the embedding of every sequence.

    Hits are read and checked, not only looked up: a damaged entry is computed again. What was computed is published as
    it comes, and on any interruption, so that running again goes on where this stopped.

    Parameters
    ----------
    sequences
        Normalised; equal ones are computed once.
    trunk, recipe
        The trunk digest of the weights that `encoder` holds; what to compute, and how to store it.
    encoder
        Makes the encoder; called only when something must be computed.
    attest
        Returns the device class and torch's version; called likewise.
    token_budget
        Tokens in one pass.
    progress
        Told how far the work is.

    Raises
    ------
    StorageError
        When the cache can't be read or written.

    """
    started = time.perf_counter()
    keys = [recipe.key(trunk, s) for s in sequences]
    by_key = dict(zip(keys, sequences, strict=True))
    found = [entry for entry, _ in cache.find(by_key)]
    done = {e.key: Embedded(e.key, e.shape, e.stored, e.content) for e in found}
    missing = {key: s for key, s in by_key.items() if key not in done}
    read = [*found, *(_derive(cache, trunk, recipe, missing, done) if missing else ())]
    missing = {key: s for key, s in missing.items() if key not in done}
    tokens = sum(_tokens(_spans(s, recipe)) for s in missing.values())
    if missing:
        job = _Job(trunk, recipe, cache, encoder(), attest(), token_budget, progress)
        if progress:
            peak = job.encoder.peak() if tokens >= _WORTH_MEASURING else 0.0
            progress.start(len(by_key), len(read), tokens, peak)
        job.run(missing, done)
    elif progress:
        progress.start(len(by_key), len(read), 0, 0.0)
    derived = len(read) - len(found)
    cache.record_use(len(found), derived, len(missing), read)
    return Outcome(
        tuple(done[key] for key in keys),
        sequences=len(sequences),
        unique=len(by_key),
        hits=len(found),
        derived=derived,
        computed=len(missing),
        tokens=tokens,
        seconds=time.perf_counter() - started,
        saved_seconds=sum(e.seconds for e in read),
    )


def _derive(
    cache: EmbeddingCache, trunk: str, recipe: Recipe, missing: dict[str, str], done: dict[str, Embedded]
) -> list[Entry]:
    """Publish what can be derived of what is missing, and return the entries that it was derived from."""
    publications: dict[str, Publication] = {}
    read: dict[str, list[Entry]] = {}
    try:
        for key, array, start, source in derive(cache, trunk, recipe, missing):
            device_class = source.device_class
            if device_class not in publications:
                publications[device_class] = cache.begin(trunk, recipe)
            content = publications[device_class].add(key, array, source.length, start)
            done[key] = Embedded(key, array.shape, recipe.stored, content)
            read.setdefault(device_class, []).append(source)
        for device_class, publication in publications.items():
            # It took, and would take again, what its sources took.
            seconds = sum(e.seconds for e in read[device_class])
            tokens = sum(e.length + 2 for e in read[device_class])
            publication.publish(Attestation(device_class, "", _now(), round(seconds, 6), tokens, "derived"))
    finally:
        for publication in publications.values():
            publication.discard()
    if publications:
        cache.tidy()
    return [entry for entries in read.values() for entry in entries]


@dataclass
class _Job:
    trunk: str
    recipe: Recipe
    cache: EmbeddingCache
    encoder: Encoder
    attested: tuple[str, str]
    token_budget: int
    progress: Progress | None

    def run(self, missing: dict[str, str], done: dict[str, Embedded]) -> None:
        lots = [_Lot()]
        # Compression and the disk have a thread of their own, so that neither holds the encoder; one lot at a time.
        with ThreadPoolExecutor(1, "publisher") as publisher:
            flying: deque[Future[None]] = deque()
            try:
                for computed in self._compute(missing):
                    lots[-1].note(computed)
                    if self.progress:
                        self.progress.advance(1, computed.tokens, self._flops(missing[computed.key]))
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
                self._keep(flying, lots, done, error)
                raise
            finally:
                for lot in lots:
                    lot.close()

    def _keep(
        self, flying: Iterable[Future[None]], lots: list[_Lot], done: dict[str, Embedded], error: BaseException
    ) -> None:
        """Publish what is finished, after Ctrl-C or an error, in publishing too. An entry published twice does no harm."""
        try:
            wait(list(flying))
        finally:
            try:
                self._publish_all(lots, done)
            except StorageError as failed:
                error.add_note(f"and what was finished could not be kept: {failed}")

    def _publish_all(self, lots: list[_Lot], done: dict[str, Embedded]) -> None:
        for lot in lots:
            if not lot.published:
                self._publish(lot, done)

    def _flops(self, sequence: str) -> float:
        return sum(self.encoder.flops(end - start) for start, end in _spans(sequence, self.recipe))

    def _compute(self, missing: dict[str, str]) -> Iterator[_Computed]:
        """Yield each sequence's embedding as soon as its last window is done."""
        recipe = self.recipe
        layer = recipe.layer
        outputs = Outputs.to_pool(layer, recipe.pooling)
        parts, owners = [], []
        spans = {key: _spans(s, recipe) for key, s in missing.items()}
        for key, sequence in missing.items():
            for number, (start, end) in enumerate(spans[key]):
                parts.append(sequence[start:end])
                owners.append((key, number))
        waiting: dict[str, dict[int, _Window]] = {}
        for index, encoded in self.encoder.compute(parts, outputs, self.token_budget):
            key, number = owners[index]
            window = encoded.hidden[layer], encoded.received.get(layer)
            if len(spans[key]) == 1:
                yield self._stored(key, spans[key], [window])
                continue
            waiting.setdefault(key, {})[number] = window
            if len(waiting[key]) == len(spans[key]):
                windowed = waiting.pop(key)
                yield self._stored(key, spans[key], [windowed[n] for n in range(len(windowed))])

    def _stored(self, key: str, spans: list[tuple[int, int]], windowed: list[_Window]) -> _Computed:
        """Return a sequence's embedding from its windows' outputs."""
        pooling = self.recipe.pooling
        start = None
        if pooling == "per_residue":
            start = self._rounded(_merge(windowed, spans, "cls"))
        return _Computed(key, self._rounded(_merge(windowed, spans, pooling)), start, spans[-1][1], _tokens(spans))

    def _rounded(self, array: NDArray[np.float32]) -> NDArray[np.generic]:
        return to_stored(finite(array, self.recipe.precision), self.recipe.stored)

    def _write(self, lot: _Lot, done: dict[str, Embedded]) -> None:
        """Write what is noted to the lot's segment."""
        while lot.waiting:
            computed = lot.waiting[0]
            if lot.publication is None:
                lot.publication = self.cache.begin(self.trunk, self.recipe)
            content = lot.publication.add(computed.key, computed.array, computed.length, computed.start)
            done[computed.key] = Embedded(computed.key, computed.array.shape, self.recipe.stored, content)
            lot.tokens += computed.tokens
            lot.written_bytes += computed.array.nbytes
            lot.waiting.popleft()

    def _publish(self, lot: _Lot, done: dict[str, Embedded]) -> None:
        self._write(lot, done)
        if lot.publication is None:
            return
        device_class, torch_version = self.attested
        seconds = round(time.perf_counter() - lot.since, 6)
        lot.publication.publish(Attestation(device_class, torch_version, _now(), seconds, lot.tokens))
        lot.published = True
        self.cache.tidy()


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _spans(sequence: str, recipe: Recipe) -> list[tuple[int, int]]:
    return windows(len(sequence), recipe.window, recipe.overlap)


def _tokens(spans: list[tuple[int, int]]) -> int:
    """Return the tokens of a sequence's windows: each has a start and an end token."""
    return sum(end - start + 2 for start, end in spans)


def _merge(windowed: list[_Window], spans: list[tuple[int, int]], pooling: str) -> NDArray[np.float32]:
    """Return a sequence's embedding: residues averaged over the windows they lie in, then pooled.

    ``cls`` is the mean of the windows' start tokens; the attention that a residue receives is averaged as it is.
    """
    if len(windowed) == 1:
        hidden, received = windowed[0]
        return pool(hidden, pooling, received)
    if pooling == "cls":
        return pool_residues(np.stack([hidden[0] for hidden, _ in windowed]), "mean")
    residues = _averaged([hidden[1:-1] for hidden, _ in windowed], spans)
    if pooling == "per_residue":
        return residues
    weights = [received[:, None] for _, received in windowed if received is not None]
    return pool_residues(residues, pooling, _averaged(weights, spans)[:, 0] if weights else None)


def _averaged(windowed: list[NDArray[np.float32]], spans: list[tuple[int, int]]) -> NDArray[np.float32]:
    """Return (L, n) rows, each the mean of those of the windows that it lies in."""
    length = spans[-1][1]
    total, count = np.zeros((length, windowed[0].shape[1]), dtype=np.float64), np.zeros((length, 1))
    for (start, end), rows in zip(spans, windowed, strict=True):
        total[start:end] += rows
        count[start:end] += 1
    return (total / count).astype(np.float32)
