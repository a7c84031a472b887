"""Embeddings of some sequences: from the cache where they are known, through the encoder where they are not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proteus_pipeline.embeddings.computing import Embedded, Progress, spans_of, tokens_of
from proteus_pipeline.embeddings.deriving import derive, sources
from proteus_pipeline.embeddings.engine import Done, Engine, LocalEngine, Work
from proteus_pipeline.embeddings.explaining import MOST_EXPLAINED, Miss, counts, explain_missing
from proteus_pipeline.embeddings.hot import PORTION, HotRun, alike
from proteus_pipeline.embeddings.index import Attestation, now
from proteus_pipeline.embeddings.leases import Lease
from proteus_pipeline.embeddings.publication import Publication
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.stored import to_fp32
from proteus_pipeline.errors import ConfigError, StorageError
from proteus_pipeline.models.device import attested, on_gpu
from proteus_pipeline.models.encoder import TOKENS_PER_BATCH
from proteus_pipeline.stores.counts import count, count_requests

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.embeddings.found import Entry
    from proteus_pipeline.models.encoder import Encoder
    from proteus_pipeline.serving.interface import ModelInterface

# Another run may evict what was just made: it is made again so often.
_ATTEMPTS = 3


@dataclass(frozen=True)
class Outcome:
    """What `embed` did.

    Attributes
    ----------
    entries
        One for each sequence asked for, in their order.
    sequences, unique, hits, derived, computed
        Counts; the last three add up to `unique`.
    from_redis
        How many of the hits came from Redis.
    other_classes
        By device class, how many hits and derived hits are of another one than this machine's.
    tokens
        Tokens computed.
    seconds
        Wall time in all.
    saved_seconds, saved_gpu_seconds
        What the hits took when they were computed; of that, on a GPU.
    workers
        How many processes of a cluster computed; 0 where this one did.
    misses
        How many were computed for which reason: `proteus_pipeline.embeddings.explaining.Miss.differs`.
    explained
        Why each of them was, of the first `MOST_EXPLAINED`: of millions, that would be more than all else that a run remembers.

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
    workers: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    from_redis: int = 0
    saved_gpu_seconds: float = 0.0
    explained: tuple[Miss, ...] = ()
    other_classes: dict[str, int] = field(default_factory=dict)


def embed(
    sequences: Sequence[str],
    *,
    trunk: str,
    recipe: Recipe,
    cache: EmbeddingCache,
    encoder: Callable[[], Encoder],
    attest: Callable[[], tuple[str, str]],
    token_budget: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> Outcome:
    """Make sure that the cache holds the embedding of every sequence; what is missing is computed in this process.

    See `embed_by`.

    Parameters
    ----------
    sequences, trunk, recipe, cache, progress
        As for `embed_by`.
    encoder
        Makes the encoder, over weights whose trunk digest is `trunk`; called only when something must be computed.
    attest
        Returns the device class and torch's version; called likewise.
    token_budget
        Tokens in one pass.

    Raises
    ------
    StorageError
        When the cache can't be read or written.

    """
    engine = LocalEngine(encoder, attest, token_budget)
    return embed_by(engine, sequences, trunk=trunk, recipe=recipe, cache=cache, progress=progress)


def embed_by(
    engine: Engine,
    sequences: Sequence[str],
    *,
    trunk: str,
    recipe: Recipe,
    cache: EmbeddingCache,
    progress: Progress | None = None,
) -> Outcome:
    """Make sure that the cache holds the embedding of every sequence.

    Hits are read and checked, not only looked up: a damaged entry is computed again. What was computed is published as
    it comes, and on any interruption, so that running again goes on where this stopped.

    Parameters
    ----------
    engine
        Computes what is missing.
    sequences
        Normalised; equal ones are computed once.
    trunk, recipe
        The trunk digest of the weights; what to compute, and how to store it.
    cache
        Where embeddings are, and go.
    progress
        Told how far the work is.

    Raises
    ------
    StorageError
        When the cache can't be read or written.
    ProteusError
        What else keeps the engine from computing.

    """
    started = time.perf_counter()
    keys = [recipe.key(trunk, s) for s in sequences]
    by_key = dict(zip(keys, sequences, strict=True))
    hot = cache.hot.run(trunk, recipe) if cache.hot else None
    with cache.hold() as lease:
        began = time.perf_counter()
        found = [entry for entry, _ in cache.find(by_key)]
        reading = time.perf_counter() - began
        _count_shared(cache, len(by_key), found)
        lease.add(e.segment for e in found)
        done = {e.key: Embedded(e.key, e.shape, e.stored, e.content) for e in found}
        missing = _without(by_key, done)
        read = [*found, *(_derive(cache, trunk, recipe, missing, done, lease) if missing else ())]
        missing = _without(missing, done)
        derived = len(read) - len(found)
        fetched = list(_fetch(cache, hot, trunk, recipe, missing, lease)) if hot else []
        done |= {e.key: Embedded(e.key, e.shape, e.stored, e.content) for e in fetched}
        read += fetched
        missing = _without(missing, done)
        tokens = sum(tokens_of(spans_of(s, recipe)) for s in missing.values())
        misses, explained = _explained(cache, missing, trunk, recipe)
        work = Work(trunk, recipe, cache, missing, tokens, lease, progress, len(by_key), len(read), hot)
        computing = _compute(engine, work)
        done |= computing.entries
        computed = computing.computed
        # What another run computed while this one was at work is a hit.
        hits = len(found) + len(fetched) + len(missing) - computed
        read += computing.theirs
        cache.record_use(hits, derived, computed, read, hot.counts if hot else None)
        if found:
            count("proteus_cache_load_seconds", reading, cache="embeddings")
        count("proteus_embedding_saved_seconds_total", sum(e.seconds for e in read))
        cache.fit()
    return Outcome(
        tuple(done[key] for key in keys),
        sequences=len(sequences),
        unique=len(by_key),
        hits=hits,
        derived=derived,
        computed=computed,
        tokens=tokens,
        seconds=time.perf_counter() - started,
        saved_seconds=sum(e.seconds for e in read),
        workers=computing.workers,
        from_redis=len(fetched),
        misses=misses,
        saved_gpu_seconds=sum(e.seconds for e in read if on_gpu(e.device_class)),
        explained=explained,
        other_classes=_of_others(cache, read),
    )


def _without(sequences: dict[str, str], done: Mapping[str, Embedded]) -> dict[str, str]:
    """Return the sequences that are not done: where none is, the very same, since of millions a copy takes memory."""
    return {key: s for key, s in sequences.items() if key not in done} if done else sequences


def _explained(
    cache: EmbeddingCache, missing: Mapping[str, str], trunk: str, recipe: Recipe
) -> tuple[dict[str, int], tuple[Miss, ...]]:
    """Count why the cache has no entry of some sequences, and say it of the first ones; the others' reasons are let go."""
    why = explain_missing(cache, missing, trunk, recipe)
    return counts(why), tuple(why[:MOST_EXPLAINED])


def _count_shared(cache: EmbeddingCache, asked: int, found: Sequence[Entry]) -> None:
    """Count what the shared cache beneath was asked for: what this one has not."""
    if cache.shared is None:
        return
    here = cache.visible.segments()
    missed = "failed" if cache.visible_beneath is None else "miss"
    count_requests("shared", **{"hit": sum(e.segment not in here for e in found), missed: asked - len(found)})


def _compute(engine: Engine, work: Work) -> Done:
    """Compute what is missing; where nothing is, the engine is not asked."""
    if work.missing:
        return engine.compute(work)
    work.start()
    return Done({}, 0)


def _of_others(cache: EmbeddingCache, read: Sequence[Entry]) -> dict[str, int]:
    """Count entries by their device class, where that is not this machine's: which it is takes a second to ask torch."""
    try:
        mine = cache.device_class() if read else ""
    except ConfigError:  # the GPU that the settings name is not here: nor was anything computed on it here
        mine = ""
    return dict(sorted(Counter(e.device_class for e in read if e.device_class != mine).items()))


def get_or_compute(
    cache: EmbeddingCache, sequences: Sequence[str], model: ModelInterface, recipe: Recipe, *, device: str
) -> list[NDArray[np.float32]]:
    """Return embeddings as numbers: `proteus_pipeline.EmbeddingCache.get_or_compute`."""
    trunk = model.checkpoint.trunk_digest
    keys = [recipe.key(trunk, s) for s in sequences]
    arrays: dict[str, NDArray[np.float32]] = {}
    with cache.hold() as mine:  # until they are read: another run may be short of room
        for _ in range(_ATTEMPTS):
            outcome = embed(
                sequences,
                trunk=trunk,
                recipe=recipe,
                cache=cache,
                encoder=lambda: model.encoder(precision=recipe.precision, numerics=recipe.numerics, device=device),
                attest=lambda: attested(device),
            )
            for entry, array in cache.find(e.key for e in outcome.entries):
                arrays[entry.key] = to_fp32(array, entry.stored)
                mine.add([entry.segment])
            if arrays.keys() >= set(keys):
                return [arrays[key] for key in keys]
    raise StorageError(f"embeddings are evicted from {cache.path} as fast as they are made", "raise cache.max_bytes")


def _derive(
    cache: EmbeddingCache,
    trunk: str,
    recipe: Recipe,
    missing: dict[str, str],
    done: dict[str, Embedded],
    lease: Lease,
) -> list[Entry]:
    """Publish what can be derived of what is missing, and return the entries that it was derived from."""
    # As old as the oldest that it may follow from: what is invalidated of those, here or on another machine, is of these.
    kinds = [(r.layer, r.pooling, r.stored) for r in sources(recipe)]
    oldest = min(
        (
            h.published
            for h in cache.all_segments()
            if h.trunk == trunk and tuple(map(h.recipe.get, ("layer", "pooling", "stored"))) in kinds
        ),
        default=None,
    )
    publications: dict[str, Publication] = {}
    read: dict[str, list[Entry]] = {}
    try:
        for key, array, start, source in derive(cache, trunk, recipe, missing):
            device_class = source.device_class
            if device_class not in publications:
                publications[device_class] = cache.begin(trunk, recipe, oldest)
            content = publications[device_class].add(key, array, source.length, start)
            done[key] = Embedded(key, array.shape, recipe.stored, content)
            read.setdefault(device_class, []).append(source)
        for device_class, publication in publications.items():
            # It took, and would take again, what its sources took.
            seconds = sum(e.seconds for e in read[device_class])
            tokens = sum(e.length + 2 for e in read[device_class])
            made = Attestation(device_class, "", now(), round(seconds, 6), tokens, "derived")
            lease.add([publication.publish(made).segment])
    finally:
        for publication in publications.values():
            publication.discard()
    if publications:
        cache.tidy()
    return [entry for entries in read.values() for entry in entries]


def _fetch(
    cache: EmbeddingCache, hot: HotRun, trunk: str, recipe: Recipe, missing: Mapping[str, str], lease: Lease
) -> Iterator[Entry]:
    """Publish what Redis has of what is missing, as it was computed elsewhere, and yield its entries here."""
    keys = list(missing)
    for start in range(0, len(keys), PORTION):
        wanted = {key: missing[key] for key in keys[start : start + PORTION]}
        vectors = hot.fetch(wanted, cache.events)
        for attestation, published, some in alike(vectors):
            # Its own time, and not `begin`'s: an invalidation that comes in this moment hides it too.
            publication = Publication(cache.store, trunk, recipe, published)
            try:
                for v in some:
                    publication.add(v.key, v.array, v.length)
                lease.add([publication.publish(attestation, via="redis").segment])
            finally:
                publication.discard()
        if vectors:
            cache.tidy()
            yield from (entry for entry, _ in cache.find(v.key for v in vectors))
