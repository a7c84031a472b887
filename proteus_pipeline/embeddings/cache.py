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
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.embeddings.events import make_event, write_event
from proteus_pipeline.embeddings.exchange import Copied, copy
from proteus_pipeline.embeddings.hot import HotTier
from proteus_pipeline.embeddings.index import Attestation, SegmentHeader
from proteus_pipeline.embeddings.leases import Lease, lease
from proteus_pipeline.embeddings.publication import SEGMENTS, Publication, check_entry
from proteus_pipeline.embeddings.reading import Reader, ahead
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.shared import (
    LOCAL_BYTES,
    WriteBack,
    check_has_cache,
    merge_far,
    open_shared,
    open_tier,
    reading_ahead,
)
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES, to_fp32
from proteus_pipeline.embeddings.usage import last_used, record_use, uses
from proteus_pipeline.embeddings.visible import Entry, Found, Visible
from proteus_pipeline.errors import CacheInvalidationError, ConfigError, IntegrityError, StorageError
from proteus_pipeline.eviction import policies as eviction
from proteus_pipeline.stores.counts import count
from proteus_pipeline.stores.read_through import ReadThrough
from proteus_pipeline.stores.store import LocalStore, Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.checking import Audited, Verified
    from proteus_pipeline.embeddings.computing import Embedded
    from proteus_pipeline.embeddings.events import CacheEvent
    from proteus_pipeline.embeddings.explaining import Miss, Plan
    from proteus_pipeline.embeddings.housekeeping import Cleaning
    from proteus_pipeline.serving.interface import ModelInterface
    from proteus_pipeline.stores.redis import RedisClient

ACCEPT = ("any", "same_class")
POLICIES = tuple(name for name in eviction.POLICIES if name != "ttl")
_ATTEMPTS = 3
# Below this, starting threads takes longer than they save.
_WORTH_THREADS = 8 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """What a cache has by some weights and one recipe.

    Attributes
    ----------
    trunk, recipe
        Of all of it.
    entries, segments, nbytes
        How much.
    used
        When it was last read, or else written, seconds since 1970.

    """

    trunk: str
    recipe: Mapping[str, Any]
    entries: int
    segments: int
    nbytes: int
    used: float


class EmbeddingCache:
    """Embeddings by key, under one folder.

    Parameters
    ----------
    path
        The folder; created by the first write.
    accept
        ``any``: entries of every device class are hits, those of this machine's class first; ``same_class``: only
        those of this machine's class are.
    device_class
        Returns this machine's class; called only where entries differ in theirs.
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
        if accept not in ACCEPT:
            raise ConfigError(f"cache.accept is {accept!r}", f"use one of {', '.join(ACCEPT)}")
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError(f"cache.max_bytes is {max_bytes}", "use a number of bytes above 0, or null for no limit")
        if policy not in POLICIES:
            raise ConfigError(f"cache.policy is {policy!r}", f"use one of {', '.join(POLICIES)}")
        self.max_bytes, self._policy = max_bytes, policy
        self.path = Path(path)
        self.store = LocalStore(self.path)
        self.visible = Visible(self.store)
        self._accept = accept
        self._device_class = device_class or _this_device_class
        only_mine = self._device_class if accept == "same_class" else None
        self.hot = HotTier(redis, only_mine) if redis else None
        self.shared = shared
        self._local_bytes = local_bytes
        self._beneath, self._visible_beneath = open_shared(shared, self.path, local_bytes, self.visible)
        self._write_back = (
            WriteBack(self.store, shared, self._beneath) if write_back and shared and self._beneath else None
        )
        if write_back and not self._write_back:
            raise ConfigError("cache.write_back is true, and there is no shared cache", "set cache.shared, or false")
        self._looking = threading.Lock()  # readers ahead look up one at a time
        self._reader = Reader([self.store, *([self._beneath] if self._beneath else [])])

    def refresh(self) -> None:
        """See the segments that other processes published since, and forget those that are gone.

        Raises
        ------
        IntegrityError
            When an event is damaged, so that what it hides is not known.
        StorageError
            When the folder can't be read.

        """
        self.visible.refresh()
        if self._visible_beneath:
            self._visible_beneath.refresh()

    @property
    def events(self) -> list[CacheEvent]:
        """All events that hold here, those of the cache beneath with them, the oldest first, as of the last `refresh`."""
        return (self._visible_beneath or self.visible).events

    def all_segments(self) -> list[SegmentHeader]:
        """Return the segments that have visible entries, here and beneath."""
        self.refresh()
        beneath = self._visible_beneath.segments() if self._visible_beneath else {}
        return list((beneath | self.visible.segments()).values())

    def look_up(self, keys: Sequence[str]) -> list[Found]:
        """Return what this cache, and the shared one beneath it, have of some keys; nothing is read.

        Parameters
        ----------
        keys
            Each once.

        """
        self.refresh()
        only = self._accept == "same_class"
        found = [self.visible.find(keys, mine=self._device_class, only_mine=only)]
        if self._visible_beneath:
            rest = found[0].missing()
            found.append(self._visible_beneath.find(rest, mine=self._device_class, only_mine=only))
        return found

    def candidates(self, keys: Sequence[str]) -> dict[str, list[Entry]]:
        """Return the acceptable entries of each key that has any, the best first: own class, then the newest."""
        by_key: dict[str, list[Entry]] = {}
        for found in self.look_up(list(dict.fromkeys(keys))):
            for entry in found.entries():
                by_key.setdefault(entry.key, []).append(entry)
        return by_key

    def read(self, entry: Entry, residues: slice | None = None) -> NDArray[np.generic]:
        """Return an entry's array in its stored dtype, checked against its checksum and its content hash.

        Parameters
        ----------
        entry
            Of this cache.
        residues
            Of a per-residue entry, the residues wanted; all where None.

        Raises
        ------
        IntegrityError
            When the bytes are not what was written.
        StorageError
            When they are gone or can't be read.

        """
        array = self._reader.array(entry)
        return array if residues is None else array[residues]

    def read_start(self, entry: Entry) -> NDArray[np.generic] | None:
        """Return the start token's vector of a per-residue entry, (D,) in its stored dtype; None where it is not known.

        Raises
        ------
        IntegrityError
            When the bytes are not what was written.
        StorageError
            When they are gone or can't be read.

        """
        header = self.visible.header(entry.segment)
        if header is None and self._visible_beneath:
            header = self._visible_beneath.header(entry.segment)
        return self._reader.start(entry, header) if header else None

    def find(self, keys: Iterable[str]) -> Iterator[tuple[Entry, NDArray[np.generic]]]:
        """Yield the first sound entry of each key that has one, with its array, in the order of the keys.

        Damaged ones are warned of, and passed over.
        """
        unique = list(dict.fromkeys(keys))
        by_key = self.candidates(unique)
        found = [by_key[key] for key in unique if key in by_key]
        here = self.visible.segments()
        if isinstance(self._beneath, ReadThrough) and any(entries[0].segment not in here for entries in found):
            yield from filter(None, ahead(self._first_sound, reading_ahead(self._beneath, found, here)))
        elif sum(entries[0].nbytes for entries in found) > _WORTH_THREADS:
            yield from filter(None, ahead(self._first_sound, found))
        else:
            yield from filter(None, map(self._first_sound, found))

    def _first_sound(self, entries: Sequence[Entry]) -> tuple[Entry, NDArray[np.generic]] | None:
        failed: dict[Entry, StorageError] = {}
        for entry in entries:
            try:
                array = self._reader.array(entry)
            except StorageError as error:
                failed[entry] = error
                continue
            self._warn(failed)
            return entry, array
        # Gone underfoot, to another segment perhaps; or sound in the cache beneath.
        with self._looking:
            again = [e for e in self._elsewhere(entries[0].key) if e not in failed]
        self._warn(failed)
        return self._first_sound(again) if again else None

    def _warn(self, failed: Mapping[Entry, StorageError]) -> None:
        """Say what is damaged, or gone though it is listed; what was evicted or merged meanwhile is nobody's fault."""
        for entry, error in failed.items():
            if isinstance(error, IntegrityError):
                count("proteus_integrity_findings_total", of="embeddings")
            if isinstance(error, IntegrityError) or entry.segment in self.visible.segments():
                _log.warning("%s", error)

    def _elsewhere(self, key: str) -> list[Entry]:
        """Return all entries of a key as they are now, here and beneath."""
        found = self.look_up([key])
        if self._visible_beneath:
            only = self._accept == "same_class"
            found.append(self._visible_beneath.find([key], mine=self._device_class, only_mine=only))
        return [entry for part in found for entry in part.entries()]

    def get(self, key: str, residues: slice | None = None) -> NDArray[np.float32] | None:
        """Return one embedding as fp32, (L, D) or (D,), or None.

        Parameters
        ----------
        key
            Its embedding key.
        residues
            Of a per-residue embedding, the residues wanted; all where None.

        """
        if self._accept == "any" and residues is None:
            self.visible.refresh_events()
            place = self.visible.locate_one(key)
            vector = self._reader.vector(*place) if place else None
            if vector is not None:
                return vector
        found = self.find_one(key)
        if found is None:
            return None
        entry, array = found
        return to_fp32(array if residues is None else array[residues], entry.stored)

    def find_one(self, key: str) -> tuple[Entry, NDArray[np.generic]] | None:
        """Return one key's entry and its array in the stored dtype, or None: what `find` yields, for one key at once."""
        if self._accept == "any":
            # For one key, what was seen last will do: an entry never changes, and only what hides it must be asked for.
            self.visible.refresh_events()
            entry = self.visible.find_one(key)
            if entry is not None:
                try:
                    return entry, self._reader.array(entry)
                except StorageError:
                    pass  # there may be another
        return next(self.find([key]), None)

    def vectors(self, keys: Sequence[str]) -> NDArray[np.generic]:
        """Return many pooled embeddings in their stored dtype, (N, D), in the order of the keys.

        Raises
        ------
        StorageError
            When one is not here.
        IntegrityError
            When one is here, and damaged wherever it is stored.
        ConfigError
            When they are not of one width and dtype.

        """
        unique = list(dict.fromkeys(keys))
        parts = self.look_up(unique)
        kinds = {(h.stored, h.width, h.layout) for part in parts for h in part.headers()}
        if not kinds and unique:
            raise StorageError(f"{unique[0]} and {len(unique) - 1} others are not in {self.path}", "compute them")
        if len(kinds) != 1 or next(iter(kinds))[2] != "pooled":
            raise ConfigError(f"embeddings of {len(kinds)} kinds make no table", "ask for pooled ones of one recipe")
        ((stored, width, _),) = kinds
        table = np.empty((len(unique), width), dtype=NUMPY_DTYPES[stored])
        places = {key: i for i, key in enumerate(unique)}
        left = np.ones(len(unique), dtype=bool)
        for part in parts:
            for segment, some, offsets, contents in part.places():
                rows = [places[key] for key in some]
                read = np.empty((len(rows), width), dtype=table.dtype)
                for bad in self._reader.rows(segment, offsets, contents, read):
                    read[bad] = self._sound(some[bad])
                table[rows] = read
                left[rows] = False
        if left.any():
            gone = unique[int(np.argmax(left))]
            raise StorageError(f"{gone} and {left.sum() - 1} others are not in {self.path}", "compute them")
        return table if len(unique) == len(keys) else table[[places[key] for key in keys]]

    def view(self, key: str) -> NDArray[np.generic] | None:
        """Return a pooled embedding as it lies in its file, (D,) in its stored dtype, read-only and mapped; None for a miss.

        Nothing is copied: of many views, the system keeps in memory what was looked at. It is checked once, here.

        Raises
        ------
        ConfigError
            For an embedding per residue: it is compressed, and has to be read.
        StorageError
            When its segment can't be mapped.

        """
        self.refresh()
        entry = self.visible.find_one(key)
        if entry is None:
            entry = next((e for found in self.look_up([key]) for e in found.best()), None)
        return None if entry is None else self._reader.view(entry)

    def _sound(self, key: str) -> NDArray[np.generic]:
        """Return a key's array from whichever entry of it is sound."""
        for _, array in self.find([key]):
            return array
        raise IntegrityError(f"entry {key} in {self.path} is damaged", "run: proteus cache verify --repair")

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
        if not keys or not len(keys) == len(arrays) == len(lengths):
            raise ValueError(f"{len(keys)} keys, {len(arrays)} arrays and {len(lengths)} lengths make no segment")
        if len(set(keys)) != len(keys):
            raise ValueError("a segment holds each key once")
        for key, array, length in zip(keys, arrays, lengths, strict=True):
            check_entry(recipe, key, array, length, arrays[0].shape[-1])
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
        from proteus_pipeline.embeddings.embedder import embed
        from proteus_pipeline.models.device import attested

        trunk = model.checkpoint.trunk_digest
        keys = [recipe.key(trunk, s) for s in sequences]
        arrays: dict[str, NDArray[np.float32]] = {}
        with self.hold() as mine:  # until they are read: another run may be short of room
            for _ in range(_ATTEMPTS):
                outcome = embed(
                    sequences,
                    trunk=trunk,
                    recipe=recipe,
                    cache=self,
                    encoder=lambda: model.encoder(precision=recipe.precision, numerics=recipe.numerics, device=device),
                    attest=lambda: attested(device),
                )
                for entry, array in self.find(e.key for e in outcome.entries):
                    arrays[entry.key] = to_fp32(array, entry.stored)
                    mine.add([entry.segment])
                if arrays.keys() >= set(keys):
                    return [arrays[key] for key in keys]
        raise StorageError(f"embeddings are evicted from {self.path} as fast as they are made", "raise cache.max_bytes")

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
        from proteus_pipeline.embeddings.computing import compute
        from proteus_pipeline.models.device import device_class

        def again(missing: Mapping[str, str]) -> Iterator[tuple[str, NDArray[np.generic]]]:
            encoder = model.encoder(precision=recipe.precision, numerics=recipe.numerics, device=device)
            return ((done.key, done.array) for done in compute(encoder, recipe, missing))

        trunk, here = model.checkpoint.trunk_digest, device_class(device)
        return audit(self, sequences, trunk, recipe, compute=again, device_class=here, sample=sample)

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
        try:
            self.refresh()
            known = [h.published for h in self.all_segments() if h.trunk == trunk]
            event = make_event("invalidated", reason, after=max(known, default=0), trunk=trunk, recipe=recipe)
            hidden = sum(h.entries for h in self.visible.segments().values() if event.hides(h))
            beneath = self._visible_beneath.segments().values() if self._visible_beneath else ()
            hidden += sum(h.entries for h in beneath if event.hides(h))
            if hidden and not dry_run:
                write_event(self.store, event)
        except StorageError as error:
            raise CacheInvalidationError(f"nothing was invalidated: {error.what}", error.remedy) from error
        if self.hot and not dry_run:
            self.hot.invalidate(trunk)
        return hidden

    def contents(self) -> list[Content]:
        """Return what there is by weights and recipe, the largest first."""
        self.refresh()
        used = last_used(self.path)
        kinds: dict[tuple[str, ...], list[SegmentHeader]] = {}
        for header in self.visible.segments().values():
            described = tuple(f"{k}={v}" for k, v in sorted(header.recipe.items()))
            kinds.setdefault((header.trunk, *described), []).append(header)
        found = [
            Content(
                headers[0].trunk,
                headers[0].recipe,
                sum(h.entries for h in headers),
                len(headers),
                sum(h.segment_bytes for h in headers),
                max(used.get(h.segment, h.published / 1e9) for h in headers),
            )
            for headers in kinds.values()
        ]
        return sorted(found, key=lambda c: -c.nbytes)

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
        """Return entries, segments, bytes on disk, raw_bytes they decode to, and hits, derived, misses so far.

        Of the hits, ``redis_hits`` came from Redis; ``redis_rejected`` values there were not what was put there.
        """
        self.refresh()
        raw = entries = on_disk = 0
        segments = self.visible.segments()
        for index in self.visible.indexes:
            on_disk += index.nbytes
        lengths = self.visible.residues()
        quarantined = self.visible.quarantined()
        for header in segments.values():
            rows = lengths[header.segment] if header.layout == "per_residue" else header.entries
            raw += rows * header.width * NUMPY_DTYPES[header.stored].itemsize
            entries += header.entries - quarantined[header.segment]
            on_disk += header.segment_bytes
        used = list(uses(self.path))
        counts = {field: sum(getattr(use, field) for use in used) for field in ("hits", "derived", "misses")}
        counts |= {f"redis_{name}": sum(use.redis.get(name, 0) for use in used) for name in ("hits", "rejected")}
        return {"entries": entries, "segments": len(segments), "bytes": on_disk, "raw_bytes": raw, **counts}


def _this_device_class() -> str:
    from proteus_pipeline.models.device import device_class

    return device_class("cpu")
