"""The embedding cache: immutable segments, and an index file as each one's commit.

Layout, under one folder::

    seg/<time_ns>-<random>.zip       entries (segment.py)
    index/<time_ns>-<random>.idx     what makes them visible (index.py)
    runs/<time_ns>-<random>.run      many indexes merged
    events/<time_ns>-<random>.json   what hides them again (events.py)
    uses.jsonl                       look-ups, one line a run (usage.py)

A writer publishes a segment, then its index, each written beside its place, flushed and renamed. Names are unique, so
writers need no lock; a key that two of them write is stored twice, and either entry is right.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.publication import Publication, check_entry
from proteus_pipeline.embeddings.reading import Reader, ahead
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES, to_fp32
from proteus_pipeline.embeddings.usage import record_use, uses
from proteus_pipeline.embeddings.visible import Entry, Found, Visible
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.stores.store import LocalStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

ACCEPT = ("any", "same_class")
# Below this, starting threads takes longer than they save.
_WORTH_THREADS = 8 << 20
_log = logging.getLogger(__name__)


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
        Another cache's folder, beneath this one: read where this one lacks an entry, and never written.

    Raises
    ------
    ConfigError
        For an unknown `accept`.

    """

    def __init__(
        self,
        path: Path | str,
        *,
        accept: str = "any",
        device_class: Callable[[], str] | None = None,
        shared: Path | str | None = None,
    ) -> None:
        if accept not in ACCEPT:
            raise ConfigError(f"cache.accept is {accept!r}", f"use one of {', '.join(ACCEPT)}")
        self.path = Path(path)
        self.store = LocalStore(self.path)
        self.visible = Visible(self.store)
        self._accept = accept
        self._device_class = device_class or _this_device_class
        self._beneath = LocalStore(shared) if shared else None
        self._visible_beneath = Visible(self._beneath, self.visible) if self._beneath else None
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
        if sum(entries[0].nbytes for entries in found) > _WORTH_THREADS:
            yield from filter(None, ahead(self._first_sound, found))
        else:
            yield from filter(None, map(self._first_sound, found))

    def _first_sound(self, entries: Sequence[Entry]) -> tuple[Entry, NDArray[np.generic]] | None:
        for entry in entries:
            try:
                return entry, self._reader.array(entry)
            except StorageError as error:
                _log.warning("%s", error)
        return None

    def get(self, key: str, residues: slice | None = None) -> NDArray[np.float32] | None:
        """Return one embedding as fp32, (L, D) or (D,), or None.

        Parameters
        ----------
        key
            Its embedding key.
        residues
            Of a per-residue embedding, the residues wanted; all where None.

        """
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

    def _sound(self, key: str) -> NDArray[np.generic]:
        """Return a key's array from whichever entry of it is sound."""
        for _, array in self.find([key]):
            return array
        raise IntegrityError(f"entry {key} in {self.path} is damaged", "run: proteus cache verify --repair")

    def begin(self, trunk: str, recipe: Recipe) -> Publication:
        """Begin a segment of entries by some weights and a recipe.

        Raises
        ------
        StorageError
            When it can't be written here.

        """
        return Publication(self.store, trunk, recipe)

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

    def record_use(self, hits: int, derived: int, misses: int, read: Iterable[Entry] = ()) -> None:
        """Add a run's look-ups to the cache's own account, with the entries that it read."""
        record_use(self.path, hits, derived, misses, Counter(entry.segment for entry in read))

    def stats(self) -> dict[str, int]:
        """Return entries, segments, bytes on disk, raw_bytes they decode to, and hits, derived, misses so far."""
        self.refresh()
        raw = entries = on_disk = 0
        segments = self.visible.segments()
        for index in self.visible.indexes:
            on_disk += index.nbytes
        lengths = self.visible.residues()
        for header in segments.values():
            rows = lengths[header.segment] if header.layout == "per_residue" else header.entries
            raw += rows * header.width * NUMPY_DTYPES[header.stored].itemsize
            entries += header.entries
            on_disk += header.segment_bytes
        used = list(uses(self.path))
        counts = {field: sum(getattr(use, field) for use in used) for field in ("hits", "derived", "misses")}
        return {"entries": entries, "segments": len(segments), "bytes": on_disk, "raw_bytes": raw, **counts}


def _this_device_class() -> str:
    from proteus_pipeline.models.device import device_class

    return device_class("cpu")
