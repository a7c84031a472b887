"""Where misses are computed: in this process, or by a cluster's workers (`proteus_pipeline.embeddings.cluster`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from proteus_pipeline.embeddings.computing import Embedded, Progress
from proteus_pipeline.embeddings.hot import HotRun
from proteus_pipeline.embeddings.job import Job
from proteus_pipeline.embeddings.leases import Lease
from proteus_pipeline.embeddings.recipe import Recipe

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.embeddings.found import Entry
    from proteus_pipeline.models.encoder import Encoder

ENGINES = ("local", "dask")
# Measuring what the machine could do takes half a second.
_WORTH_MEASURING = 50_000


@dataclass(frozen=True)
class Work:
    """What a run misses.

    Attributes
    ----------
    trunk, recipe
        What to compute.
    cache
        Where it goes.
    missing
        Sequences by key.
    tokens
        Of all of them.
    lease
        The run's.
    progress
        Told how far the work is; its `start` is called through `start`.
    total, hits
        Distinct sequences of the run, and how many are known.
    hot
        Where pooled vectors that this process computes go too.

    """

    trunk: str
    recipe: Recipe
    cache: EmbeddingCache
    missing: dict[str, str]
    tokens: int
    lease: Lease
    progress: Progress | None
    total: int
    hits: int
    hot: HotRun | None = None

    def start(self, peak: float = 0.0) -> None:
        """Say that the work begins: see `Progress.start`."""
        if self.progress:
            self.progress.start(self.total, self.hits, self.tokens, peak)


@dataclass(frozen=True)
class Done:
    """What an engine did.

    Attributes
    ----------
    entries
        What a manifest says of each key that was missing.
    computed
        How many were computed; the others were published by another run in the meantime.
    theirs
        Entries of those others, as far as they are known.
    workers
        How many processes of a cluster computed; 0 for this process alone.

    """

    entries: dict[str, Embedded]
    computed: int
    theirs: list[Entry] = field(default_factory=list)
    workers: int = 0


class Engine(Protocol):
    """Computes what is missing, and publishes it in the cache."""

    def compute(self, work: Work) -> Done:
        """Compute and publish; what is finished stays published where this raises.

        Raises
        ------
        StorageError
            When the cache can't be read or written.
        ProteusError
            What else keeps the engine from computing.

        """


@dataclass(frozen=True)
class LocalEngine:
    """The process that asks.

    Attributes
    ----------
    encoder
        Makes the encoder.
    attest
        Returns the device class and torch's version.
    token_budget
        Tokens in one pass.

    """

    encoder: Callable[[], Encoder]
    attest: Callable[[], tuple[str, str]]
    token_budget: int

    def compute(self, work: Work) -> Done:
        """Compute and publish, by `Job`."""
        encoder = self.encoder()
        attested, (lease, progress) = self.attest(), (work.lease, work.progress)
        job = Job(work.trunk, work.recipe, work.cache, encoder, attested, self.token_budget, lease, progress, work.hot)
        work.start(encoder.peak() if work.progress and work.tokens >= _WORTH_MEASURING else 0.0)
        entries: dict[str, Embedded] = {}
        theirs = job.run(work.missing, entries)
        return Done(entries, len(work.missing) - len(theirs), theirs)
