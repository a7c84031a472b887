"""Embeddings of some sequences: from the cache where they are known, through the encoder where they are not."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.computing import Embedded, Job, Progress, spans_of, tokens_of
from proteus_pipeline.embeddings.deriving import derive, sources
from proteus_pipeline.embeddings.explaining import Miss, counts, explain_missing
from proteus_pipeline.embeddings.index import Attestation, now
from proteus_pipeline.embeddings.leases import Lease
from proteus_pipeline.embeddings.publication import Publication
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.models.device import on_gpu
from proteus_pipeline.models.encoder import TOKENS_PER_BATCH

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.visible import Entry
    from proteus_pipeline.models.encoder import Encoder

# Measuring what the machine could do takes half a second.
_WORTH_MEASURING = 50_000


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
    saved_seconds, saved_gpu_seconds
        What the hits took when they were computed; of that, on a GPU.
    misses
        How many were computed for which reason: `proteus_pipeline.embeddings.explaining.Miss.differs`.
    explained
        Why each of them was.

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
    misses: dict[str, int] = field(default_factory=dict)
    saved_gpu_seconds: float = 0.0
    explained: tuple[Miss, ...] = ()


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
    with cache.hold() as lease:
        found = [entry for entry, _ in cache.find(by_key)]
        lease.add(e.segment for e in found)
        done = {e.key: Embedded(e.key, e.shape, e.stored, e.content) for e in found}
        missing = {key: s for key, s in by_key.items() if key not in done}
        read = [*found, *(_derive(cache, trunk, recipe, missing, done, lease) if missing else ())]
        missing = {key: s for key, s in missing.items() if key not in done}
        theirs: list[Entry] = []
        tokens = sum(tokens_of(spans_of(s, recipe)) for s in missing.values())
        why = explain_missing(cache, missing, trunk, recipe)
        if missing:
            job = Job(trunk, recipe, cache, encoder(), attest(), token_budget, lease, progress)
            if progress:
                peak = job.encoder.peak() if tokens >= _WORTH_MEASURING else 0.0
                progress.start(len(by_key), len(read), tokens, peak)
            theirs = job.run(missing, done)
        elif progress:
            progress.start(len(by_key), len(read), 0, 0.0)
        derived = len(read) - len(found)
        # What another run computed while this one was at work is a hit.
        hits, computed = len(found) + len(theirs), len(missing) - len(theirs)
        read += theirs
        cache.record_use(hits, derived, computed, read)
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
        misses=counts(why),
        saved_gpu_seconds=sum(e.seconds for e in read if on_gpu(e.device_class)),
        explained=tuple(why),
    )


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
