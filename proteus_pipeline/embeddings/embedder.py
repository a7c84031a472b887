"""Embeddings of some sequences: from the cache where they are known, through the encoder where they are not."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.recipe import Recipe, windows
from proteus_pipeline.embeddings.stored import content_hash, to_stored
from proteus_pipeline.errors import StorageError
from proteus_pipeline.models.encoder import Outputs
from proteus_pipeline.models.pooling import finite, pool, pool_residues

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.models.encoder import Encoder

# A crash loses what is not yet published: at most this many bytes, or this many seconds of work.
PUBLISH_BYTES = 64 << 20
PUBLISH_SECONDS = 60.0
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
    """One embedding in its stored dtype, with the residues and the tokens of its sequence."""

    key: str
    array: NDArray[np.generic]
    length: int
    tokens: int


@dataclass
class _Pending:
    """Computed, and not yet published: one list, so that Ctrl-C never finds an entry half noted."""

    entries: list[_Computed] = field(default_factory=list)
    since: float = field(default_factory=time.perf_counter)
    published: bool = False

    @property
    def due(self) -> bool:
        size = sum(e.array.nbytes for e in self.entries[-1:]) * len(self.entries)
        return size >= PUBLISH_BYTES or time.perf_counter() - self.since >= PUBLISH_SECONDS


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
    tokens = sum(_tokens(_spans(s, recipe)) for s in missing.values())
    if missing:
        job = _Job(trunk, recipe, cache, encoder(), attest(), token_budget, progress)
        if progress:
            peak = job.encoder.peak() if tokens >= _WORTH_MEASURING else 0.0
            progress.start(len(by_key), len(found), tokens, peak)
        job.run(missing, done)
    elif progress:
        progress.start(len(by_key), len(found), 0, 0.0)
    cache.record_use(len(found), 0, len(missing))
    return Outcome(
        tuple(done[key] for key in keys),
        sequences=len(sequences),
        unique=len(by_key),
        hits=len(found),
        derived=0,
        computed=len(missing),
        tokens=tokens,
        seconds=time.perf_counter() - started,
        saved_seconds=sum(e.seconds for e in found),
    )


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
        lots = [_Pending()]
        # Compression and the disk have a thread of their own, so that neither holds the encoder; one lot at a time.
        with ThreadPoolExecutor(1, "publisher") as publisher:
            flying: Future[None] | None = None
            try:
                for key, array, length, tokens in self._compute(missing):
                    stored = to_stored(finite(array, self.recipe.precision), self.recipe.stored)
                    done[key] = Embedded(
                        key, stored.shape, self.recipe.stored, content_hash(stored, self.recipe.stored)
                    )
                    lots[-1].entries.append(_Computed(key, stored, length, tokens))
                    if self.progress:
                        self.progress.advance(1, tokens, self._flops(missing[key]))
                    if lots[-1].due:
                        if flying:
                            flying.result()
                        lots[:-1] = []
                        lots.append(_Pending())
                        flying = publisher.submit(self._publish, lots[0])
                if flying:
                    flying.result()
                self._publish_all(lots)
            except BaseException as error:
                # Ctrl-C or an error, in publishing too: what is finished is kept. An entry published twice does no harm.
                try:
                    if flying:
                        wait([flying])
                finally:
                    try:
                        self._publish_all(lots)
                    except StorageError as failed:
                        error.add_note(f"and what was finished could not be kept: {failed}")
                raise

    def _publish_all(self, lots: list[_Pending]) -> None:
        for lot in lots:
            if lot.entries and not lot.published:
                self._publish(lot)

    def _flops(self, sequence: str) -> float:
        return sum(self.encoder.flops(end - start) for start, end in _spans(sequence, self.recipe))

    def _compute(self, missing: dict[str, str]) -> Iterator[tuple[str, NDArray[np.float32], int, int]]:
        """Yield key, fp32 array, residues and tokens of each sequence as soon as its last window is done."""
        recipe = self.recipe
        layer = recipe.layer
        outputs = Outputs.to_pool(layer, recipe.pooling)
        parts, owners = [], []
        spans = {key: _spans(s, recipe) for key, s in missing.items()}
        for key, sequence in missing.items():
            for number, (start, end) in enumerate(spans[key]):
                parts.append(sequence[start:end])
                owners.append((key, number))
        waiting: dict[str, dict[int, tuple[NDArray[np.float32], NDArray[np.float32] | None]]] = {}
        for index, encoded in self.encoder.compute(parts, outputs, self.token_budget):
            key, number = owners[index]
            length = len(missing[key])
            hidden, received = encoded.hidden[layer], encoded.received.get(layer)
            if len(spans[key]) == 1:
                yield key, pool(hidden, recipe.pooling, received), length, length + 2
                continue
            waiting.setdefault(key, {})[number] = hidden, received
            if len(waiting[key]) == len(spans[key]):
                windowed = waiting.pop(key)
                yield key, _merge(windowed, spans[key], recipe.pooling), length, _tokens(spans[key])

    def _publish(self, pending: _Pending) -> None:
        device_class, torch_version = self.attested
        attestation = Attestation(
            device_class,
            torch_version,
            dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            round(time.perf_counter() - pending.since, 6),
            sum(e.tokens for e in pending.entries),
        )
        self.cache.publish(
            [e.key for e in pending.entries],
            [e.array for e in pending.entries],
            [e.length for e in pending.entries],
            trunk=self.trunk,
            recipe=self.recipe,
            attestation=attestation,
        )
        pending.published = True


def _spans(sequence: str, recipe: Recipe) -> list[tuple[int, int]]:
    return windows(len(sequence), recipe.window, recipe.overlap)


def _tokens(spans: list[tuple[int, int]]) -> int:
    """Return the tokens of a sequence's windows: each has a start and an end token."""
    return sum(end - start + 2 for start, end in spans)


def _merge(
    done: dict[int, tuple[NDArray[np.float32], NDArray[np.float32] | None]], spans: list[tuple[int, int]], pooling: str
) -> NDArray[np.float32]:
    """Return a windowed sequence's embedding: residues averaged over the windows they lie in, then pooled.

    ``cls`` is the mean of the windows' start tokens; the attention that a residue receives is averaged as it is.
    """
    ordered = [done[number] for number in range(len(spans))]
    if pooling == "cls":
        return pool_residues(np.stack([hidden[0] for hidden, _ in ordered]), "mean")
    residues = _averaged([hidden[1:-1] for hidden, _ in ordered], spans)
    if pooling == "per_residue":
        return residues
    weights = [received[:, None] for _, received in ordered if received is not None]
    return pool_residues(residues, pooling, _averaged(weights, spans)[:, 0] if weights else None)


def _averaged(windowed: list[NDArray[np.float32]], spans: list[tuple[int, int]]) -> NDArray[np.float32]:
    """Return (L, n) rows, each the mean of those of the windows that it lies in."""
    length = spans[-1][1]
    total, count = np.zeros((length, windowed[0].shape[1]), dtype=np.float64), np.zeros((length, 1))
    for (start, end), rows in zip(spans, windowed, strict=True):
        total[start:end] += rows
        count[start:end] += 1
    return (total / count).astype(np.float32)
