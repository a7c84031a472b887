"""The embedding cache: immutable segments, and an index file as each one's commit.

Layout, under one folder::

    seg/<time_ns>-<random>.zip       entries (segment.py)
    index/<time_ns>-<random>.idx     what makes them visible (index.py)
    runs/<time_ns>-<random>.run      many indexes merged
    events/<time_ns>-<random>.json   what hides them again (events.py)
    shared/<place>/                  indexes of other caches, in buckets, that are read through this one (shared.py)
    uses.jsonl                       look-ups, one line a run (usage.py)

A writer publishes a segment, then its index, each written beside its place, flushed and renamed. Names are unique, so
writers need no lock; a key that two of them write is stored twice, and either entry is right.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.embeddings.contents import Content, contents, stats
from proteus_pipeline.embeddings.exchange import Copied, copy
from proteus_pipeline.embeddings.found import Entry
from proteus_pipeline.embeddings.hot import HotTier
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.leases import Lease, lease
from proteus_pipeline.embeddings.lookup import EntryLookup
from proteus_pipeline.embeddings.publication import SEGMENTS, Publication, check_entries
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.shared import (
    LOCAL_BYTES,
    WriteBack,
    check_has_cache,
    merge_far,
    open_tier,
)
from proteus_pipeline.embeddings.usage import record_use
from proteus_pipeline.embeddings.visible import Visible
from proteus_pipeline.errors import ConfigError, StorageError
from proteus_pipeline.eviction import policies as eviction
from proteus_pipeline.stores.counts import count
from proteus_pipeline.stores.store import Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.checking import Audited, Verified
    from proteus_pipeline.embeddings.computing import Embedded
    from proteus_pipeline.embeddings.explaining import Miss, Plan
    from proteus_pipeline.embeddings.housekeeping import Cleaning
    from proteus_pipeline.serving.interface import ModelInterface
    from proteus_pipeline.stores.redis import RedisClient

POLICIES = tuple(name for name in eviction.POLICIES if name != "ttl")
_log = logging.getLogger(__name__)


class EmbeddingCache(EntryLookup):
    """Embeddings by key, under one folder.

    Parameters
    ----------
    path
        The folder; created by the first write.
    accept
        ``any``: entries of every device class are hits, those of this machine's class first; ``same_class``: only
        those of this machine's class are.
    device_class
        Returns this machine's class; looking up calls it only where entries differ in theirs.
    shared
        Another cache, beneath this one: a folder or ``s3://BUCKET/PREFIX``, read where this one lacks an entry. One in a
        bucket that does not answer is done without, with one warning.
    local_bytes
        Of a shared cache in a bucket, what its indexes may take here, in ``shared/``.
    write_back
        Whether new segments are published to the shared cache too.
    max_bytes
        What segments and indexes may take; None for no limit. Whole segments are evicted at the end of a run.
    policy
        By which: a name in `proteus_pipeline.eviction.policies.POLICIES`, but for ``ttl``.
    redis
        Where runs look for pooled vectors that are in neither cache, and put those that they compute; None for nowhere.

    Raises
    ------
    ConfigError
        For an unknown `accept` or `policy`, a limit that is none, or a `shared` that is no place.

    """

    def __init__(
        self,
        path: Path | str,
        *,
        accept: str = "any",
        device_class: Callable[[], str] | None = None,
        shared: Path | str | None = None,
        max_bytes: int | None = None,
        policy: str = "lru",
        redis: RedisClient | None = None,
        local_bytes: int = LOCAL_BYTES,
        write_back: bool = False,
    ) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError(f"cache.max_bytes is {max_bytes}", "use a number of bytes above 0, or null for no limit")
        if policy not in POLICIES:
            raise ConfigError(f"cache.policy is {policy!r}", f"use one of {', '.join(POLICIES)}")
        super().__init__(path, accept=accept, device_class=device_class, shared=shared, local_bytes=local_bytes)
        self.max_bytes, self._policy, self._local_bytes = max_bytes, policy, local_bytes
        only_mine = self.device_class if accept == "same_class" else None
        self.hot = HotTier(redis, only_mine) if redis else None
        self._write_back = (
            WriteBack(self.store, shared, self._beneath) if write_back and shared and self._beneath else None
        )
        if write_back and not self._write_back:
            raise ConfigError("cache.write_back is true, and there is no shared cache", "set cache.shared, or false")

    def begin(self, trunk: str, recipe: Recipe, published: int | None = None, *, new: bool = True) -> Publication:
        """Begin a segment of entries by some weights and a recipe.

        Parameters
        ----------
        trunk, recipe
            Of its entries.
        published
            As for `proteus_pipeline.embeddings.publication.Publication`: of what follows from older entries, their time.
        new
            Whether its entries are new, and so written back to the shared cache where that is asked for.

        Raises
        ------
        StorageError
            When it can't be written here.

        """
        # What an invalidation hides is older than it, and this is not, whatever the clocks say.
        events = (e.time for e in self.visible.events if e.invalidates(trunk, recipe.described()))
        published = max(published or time.time_ns(), max(events, default=-1) + 1)
        return Publication(self.store, trunk, recipe, published, self._write_back if new else None)

    def publish(
        self,
        keys: Sequence[str],
        arrays: Sequence[NDArray[np.generic]],
        lengths: Sequence[int],
        *,
        trunk: str,
        recipe: Recipe,
        attestation: Attestation,
    ) -> None:
        """Store entries as one segment; when this returns they are on the disk and visible.

        Parameters
        ----------
        keys
            Embedding keys, each once.
        arrays
            In the recipe's stored dtype, all (L, D) or all (D,).
        lengths
            Residues of each sequence.
        trunk, recipe
            What the keys were made from.
        attestation
            How the entries came to be.

        Raises
        ------
        StorageError
            When they can't be written; the cache is then as before.
        ValueError
            When keys, arrays and lengths do not fit each other or the recipe; nothing is written.

        """
        check_entries(recipe, keys, arrays, lengths)
        publication = self.begin(trunk, recipe)
        try:
            for key, array, length in zip(keys, arrays, lengths, strict=True):
                publication.add(key, array, length)
            publication.publish(attestation)
        finally:
            publication.discard()
        self.tidy()

    def tidy(self) -> None:
        """Merge index files where there are many; whoever publishes calls it, and it may fail without harm."""
        try:
            self.refresh()
            if self.visible.merge_due():
                self.visible.merge()
        except StorageError as error:
            _log.warning("%s", error)

    def hold(self) -> AbstractContextManager[Lease]:
        """Hold what a run reads and writes until the body ends: nobody evicts or collects it."""
        return lease(self.path)

    def fit(self) -> Cleaning:
        """Evict what the byte budget has no room for; nothing where there is no budget.

        Raises
        ------
        StorageError
            When the cache can't be written.

        """
        from proteus_pipeline.embeddings.housekeeping import Cleaning, shrink

        return Cleaning() if self.max_bytes is None else shrink(self, self.max_bytes, self._policy)

    def get_or_compute(
        self, sequences: Sequence[str], model: ModelInterface, recipe: Recipe, *, device: str = "cpu"
    ) -> list[NDArray[np.float32]]:
        """Return embeddings, (D,) or (L, D) fp32 each, in the order of the sequences: stored, derived or computed now.

        Parameters
        ----------
        sequences
            Normalised: upper case, no rule left to apply.
        model
            Whose weights; loaded only where something must be computed.
        recipe
            What to compute.
        device
            Where.

        Raises
        ------
        StorageError
            When the cache can't be read or written, or the weights not be fetched.
        ConfigError
            For a layer that the model does not have.

        """
        from proteus_pipeline.embeddings.embedder import get_or_compute

        return get_or_compute(self, sequences, model, recipe, device=device)

    def plan(self, sequences: Sequence[str], trunk: str, recipe: Recipe, width: int, device_class: str = "") -> Plan:
        """Return what embedding sequences would take: `proteus_pipeline.embeddings.explaining.plan`."""
        from proteus_pipeline.embeddings.explaining import plan

        return plan(self, sequences, trunk, recipe, width, device_class)

    def explain(self, sequences: Iterable[str], trunk: str, recipe: Recipe) -> list[Miss]:
        """Say of each sequence that is a miss why: `proteus_pipeline.embeddings.explaining.explain`."""
        from proteus_pipeline.embeddings.explaining import explain

        return explain(self, sequences, trunk, recipe)

    def verify(self, *, repair: bool = False) -> Verified:
        """Compare all that is stored with its checksums: `proteus_pipeline.embeddings.checking.verify`."""
        from proteus_pipeline.embeddings.checking import verify

        verified = verify(self, repair=repair)
        if damaged := sum(finding.kind != "orphan" for finding in verified.findings):
            count("proteus_integrity_findings_total", damaged, of="embeddings")
        return verified

    def audit(
        self, sequences: Sequence[str], model: ModelInterface, recipe: Recipe, *, sample: int = 20, device: str = "cpu"
    ) -> list[Audited]:
        """Compute a sample of what is stored once more: `proteus_pipeline.embeddings.checking.audit`."""
        from proteus_pipeline.embeddings.checking import audit

        return audit(self, sequences, model, recipe, sample=sample, device=device)

    def invalidate(self, trunk: str, reason: str, *, dry_run: bool = False, **recipe: Any) -> int:
        """Hide all entries of some weights, or of those recipes that agree in the fields given, from every reader at once.

        Parameters
        ----------
        trunk
            The trunk digest.
        reason
            Why; shown by `explain`.
        dry_run
            Only count.
        recipe
            Such as ``layer=6``.

        Returns
        -------
        int
            How many entries were hidden; where there are none, no event is written.

        Raises
        ------
        CacheInvalidationError
            When it can't be carried out: the entries are seen as before.

        """
        from proteus_pipeline.embeddings.invalidation import invalidate

        return invalidate(self, trunk, reason, recipe, dry_run=dry_run)

    def contents(self) -> list[Content]:
        """Return what there is by weights and recipe, the largest first."""
        return contents(self)

    def gc(
        self, *, trunks: Collection[str] | None = None, grace_seconds: float | None = None, dry_run: bool = False
    ) -> Cleaning:
        """Remove what nobody can reach, and write small segments together.

        Parameters
        ----------
        trunks
            Trunk digests of the weights that somebody has; None where that is not known.
        grace_seconds
            What is younger stays; two weeks where None.
        dry_run
            Only say what would go.

        Raises
        ------
        StorageError
            When the cache can't be read or written.

        """
        from proteus_pipeline.embeddings import housekeeping

        grace = housekeeping.GRACE_SECONDS if grace_seconds is None else grace_seconds
        cleaning = housekeeping.plan_collection(self, trunks=trunks, grace=grace)
        if not dry_run:
            housekeeping.collect(self, cleaning)
            housekeeping.compact(self)
            self.fit()
        return cleaning

    def push(self, target: Store | Path | str, *, trunk: str = "", dry_run: bool = False) -> Copied:
        """Copy what another cache lacks to it: `proteus_pipeline.embeddings.exchange.copy`.

        Parameters
        ----------
        target
            The other cache: a folder, ``s3://BUCKET/PREFIX``, or a store.
        trunk
            Only embeddings by these weights.
        dry_run
            Only count.

        Raises
        ------
        IntegrityError
            When a segment is damaged.
        StorageError
            When the one can't be read or the other not be written: what was copied stays, and a next push goes on from it.

        """
        there = open_tier(target, self.path, self._local_bytes)
        copied = copy(self.store, there, wanted=lambda h: trunk in {"", h.trunk}, dry_run=dry_run)
        if copied.segments and not dry_run:
            after = Visible(there)
            after.refresh()
            merge_far(there, after)
        return copied

    def pull(self, source: Store | Path | str, *, trunk: str = "", dry_run: bool = False) -> Copied:
        """Copy what this cache lacks from another one: as `push`."""
        there = open_tier(source, self.path, self._local_bytes)
        check_has_cache(there)
        return copy(there, self.store, wanted=lambda h: trunk in {"", h.trunk}, dry_run=dry_run)

    def preload(self, keys: Iterable[str]) -> int:
        """Ask the system to have the segments of some keys in memory soon; return how many segments those are."""
        segments = {e.segment for entries in self.candidates(list(keys)).values() for e in entries[:1]}
        for segment in segments:
            self.store.prefetch(f"{SEGMENTS}/{segment}")
        return len(segments)

    def export(self, path: Path, ids: Sequence[str], entries: Sequence[Embedded]) -> None:
        """Write embeddings to a file of their own: `proteus_pipeline.embeddings.export.export`."""
        from proteus_pipeline.embeddings.export import export

        export(path, self, ids, entries)

    def record_use(
        self, hits: int, derived: int, misses: int, read: Iterable[Entry] = (), redis: Mapping[str, int] | None = None
    ) -> None:
        """Add a run's look-ups to the cache's own account, with the entries that it read, and what it had of Redis."""
        record_use(self.path, hits, derived, misses, Counter(entry.segment for entry in read), redis)

    def stats(self) -> dict[str, int]:
        """Return entries, segments, bytes and look-ups so far: `proteus_pipeline.embeddings.contents.stats`."""
        return stats(self)
