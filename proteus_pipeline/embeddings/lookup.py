"""Looking up and reading what a cache, and the shared one beneath it, have: entries by key, checked as they are read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from proteus_pipeline.embeddings.found import Entry, Found
from proteus_pipeline.embeddings.index import SegmentHeader
from proteus_pipeline.embeddings.reading import Reader, ahead
from proteus_pipeline.embeddings.shared import LOCAL_BYTES, DistantVisible, open_shared, reading_ahead
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES, to_fp32
from proteus_pipeline.embeddings.visible import Visible
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.stores.counts import count
from proteus_pipeline.stores.read_through import Ahead, ReadThrough
from proteus_pipeline.stores.store import LocalStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.events import CacheEvent

ACCEPT = ("any", "same_class")
# Below this, starting threads takes longer than they save.
_WORTH_THREADS = 8 << 20
# Of more keys, looking up twice takes longer than asking what is new.
_EXPECTED = 5000
_log = logging.getLogger(__name__)


class EntryLookup:
    """What `EmbeddingCache` finds and reads.

    Parameters
    ----------
    path, accept, device_class, shared, local_bytes
        As for `proteus_pipeline.embeddings.cache.EmbeddingCache`.

    Raises
    ------
    ConfigError
        For an unknown `accept`, or a `shared` that is no place.

    """

    def __init__(
        self,
        path: Path | str,
        *,
        accept: str = "any",
        device_class: Callable[[], str] | None = None,
        shared: Path | str | None = None,
        local_bytes: int = LOCAL_BYTES,
    ) -> None:
        if accept not in ACCEPT:
            raise ConfigError(f"cache.accept is {accept!r}", f"use one of {', '.join(ACCEPT)}")
        self.path = Path(path)
        self.store = LocalStore(self.path)
        self.visible = Visible(self.store)
        self.shared = shared
        self._accept = accept
        self.device_class = device_class or _this_device_class
        self._beneath, self._visible_beneath = open_shared(shared, self.path, local_bytes, self.visible)
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
        if self._visible_beneath:
            self.visible.refresh_events()
            self._visible_beneath.refresh()  # first: what is invalidated there is hidden here
        self.visible.refresh()

    def _refresh_events(self) -> None:
        """See what was hidden since, on the way of one read; a bucket is asked by `refresh` alone, since that takes longer."""
        if self._visible_beneath and not isinstance(self._beneath, ReadThrough):
            self._visible_beneath.refresh_events()
        self.visible.refresh_events()

    @property
    def events(self) -> list[CacheEvent]:
        """All events that hold here, those of the cache beneath with them, the oldest first, as of the last `refresh`."""
        return (self._visible_beneath or self.visible).events

    @property
    def visible_beneath(self) -> Visible | None:
        """What is seen of the shared cache, as of the last `refresh`; None where there is none, or it could not be asked."""
        beneath = self._visible_beneath
        return None if isinstance(beneath, DistantVisible) and beneath.left_out else beneath

    def all_segments(self) -> list[SegmentHeader]:
        """Return the segments that have visible entries, here and beneath."""
        self.refresh()
        beneath = self._visible_beneath.segments() if self._visible_beneath else {}
        return list((beneath | self.visible.segments()).values())

    def hidden_by(self, event: CacheEvent) -> int:
        """Return how many visible entries an event would hide, here and beneath."""
        beneath = self._visible_beneath.segments().values() if self._visible_beneath else ()
        return sum(h.entries for h in (*self.visible.segments().values(), *beneath) if event.hides(h))

    def look_up(self, keys: Sequence[str]) -> list[Found]:
        """Return what this cache, and the shared one beneath it, have of some keys; nothing is read.

        Parameters
        ----------
        keys
            Each once.

        """
        self.refresh()
        return self._seen(keys)

    def _seen(self, keys: Sequence[str]) -> list[Found]:
        """Return what `look_up` does, as of the last `refresh`."""
        only = self._accept == "same_class"
        found = [self.visible.find(keys, mine=self.device_class, only_mine=only)]
        if self._visible_beneath:
            rest = found[0].missing()
            found.append(self._visible_beneath.find(rest, mine=self.device_class, only_mine=only))
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
        with self._expected(unique) as begun:
            by_key = self.candidates(unique)
            found = [by_key[key] for key in unique if key in by_key]
            here = self.visible.segments()
            if isinstance(self._beneath, ReadThrough) and any(entries[0].segment not in here for entries in found):
                yield from filter(None, reading_ahead(self._beneath, found, here, self._first_sound, begun))
            elif sum(entries[0].nbytes for entries in found) > _WORTH_THREADS:
                yield from filter(None, ahead(self._first_sound, found))
            else:
                yield from filter(None, map(self._first_sound, found))

    def _expected(self, keys: Sequence[str]) -> AbstractContextManager[Ahead]:
        """Begin to fetch what a shared cache far away had when it was last asked, where it is about to be asked again.

        Of a read of 400 entries, asking took a twelfth. Nothing of it is served that is not there, or hidden, by then.
        """
        beneath = self._visible_beneath
        if not isinstance(beneath, DistantVisible) or len(keys) > _EXPECTED or not beneath.due:
            return nullcontext({})
        return beneath.expecting(self._seen(keys)[-1].best())

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
            found.append(self._visible_beneath.find([key], mine=self.device_class, only_mine=only))
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
            self._refresh_events()
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
            self._refresh_events()
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
        IntegrityError
            When it is damaged wherever it is stored.
        StorageError
            When its segment can't be mapped.

        """
        self.refresh()
        newest = self.visible.find_one(key)
        if newest is not None:
            with suppress(StorageError):  # there may be another, which was made anew
                return self._reader.view(newest)
        failed: StorageError | None = None
        for entry in (entry for found in self.look_up([key]) for entry in found.entries()):
            try:
                return self._reader.view(entry)
            except StorageError as error:
                failed = failed or error
        if failed:
            raise failed
        return None

    def _sound(self, key: str) -> NDArray[np.generic]:
        """Return a key's array from whichever entry of it is sound."""
        for _, array in self.find([key]):
            return array
        raise IntegrityError(f"entry {key} in {self.path} is damaged", "run: proteus cache verify --repair")


def _this_device_class() -> str:
    from proteus_pipeline.models.device import device_class

    return device_class("cpu")
