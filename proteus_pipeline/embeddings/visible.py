"""What a reader sees of a cache: the entries of all its indexes and runs, less those that events hide."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from proteus_pipeline.embeddings import events as event_file
from proteus_pipeline.embeddings.events import CacheEvent, event_files, read_event
from proteus_pipeline.embeddings.found import Entry, Found, entry_of
from proteus_pipeline.embeddings.index import CHECKED_BYTES, INDEXES, RUNS, Index, Record, SegmentHeader
from proteus_pipeline.embeddings.keys import key_array, key_halves
from proteus_pipeline.embeddings.merging import MERGE_AT, merge_indexes, to_merge
from proteus_pipeline.errors import StorageError
from proteus_pipeline.stores.files import storage_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.stores.store import Store

_KINDS = {INDEXES: ".idx", RUNS: ".run"}
_ATTEMPTS = 20
_log = logging.getLogger(__name__)


@dataclass
class _Loaded:
    """An index, and which of its segments and rows are hidden."""

    index: Index
    hidden: NDArray[np.bool_]
    dead: NDArray[np.int64]
    published: NDArray[np.int64] = field(init=False)
    whole: bool = False

    def shows(self, row: int, record: Record) -> bool:
        """Say whether a row, and what is in it, is visible."""
        number = record[6]
        return number < len(self.hidden) and not self.hidden[number] and not (len(self.dead) and row in self.dead)

    def __post_init__(self) -> None:
        self.published = np.array([s.published for s in self.index.segments], dtype=np.int64)


class Visible:
    """The indexes, runs and events of a store, as they are now.

    Parameters
    ----------
    store
        Where they lie.
    above
        What is seen of a cache that lies on top of this one: what is invalidated in the one is hidden in the other too.
        What else happened there is about its own files.

    """

    def __init__(self, store: Store, above: Visible | None = None) -> None:
        self._store = store
        self.beside: Visible | None = above
        if above:
            above.beside = self
        # How often its own events have changed, and those of both together when they were last applied.
        self.changes = 0
        self._applied = 0
        self._loaded: dict[str, _Loaded | None] = {}
        self._events: dict[str, CacheEvent] = {}
        self._marks: dict[str, object] = {}
        self._newest: list[_Loaded] | None = None
        self._headers: dict[str, SegmentHeader] | None = None

    @property
    def indexes(self) -> list[Index]:
        """The indexes and runs that can be read."""
        return [loaded.index for loaded in self._loaded.values() if loaded]

    @property
    def unreadable(self) -> list[str]:
        """The names of indexes and runs that can't."""
        return [name for name, loaded in self._loaded.items() if loaded is None]

    @property
    def events(self) -> list[CacheEvent]:
        """All events that hold here, the oldest first; a copied one is there once."""
        known = (self.beside.invalidations() if self.beside else {}) | self._events
        return sorted(known.values(), key=lambda e: e.time)

    def invalidations(self) -> dict[str, CacheEvent]:
        """Return what was invalidated in this store, by the events' names."""
        return {name: e for name, e in self._events.items() if e.kind == "invalidated"}

    @property
    def retired(self) -> set[str]:
        """The segments that were retired here."""
        return {s for e in self._events.values() if e.kind == "retired" for s in e.segments}

    def segments(self, *, hidden: bool = False) -> dict[str, SegmentHeader]:
        """Return the segments that have visible entries; with `hidden` also those that events hide."""
        return {
            header.segment: header
            for loaded in self._loaded.values()
            if loaded
            for header, dark in zip(loaded.index.segments, loaded.hidden, strict=True)
            if hidden or not dark
        }

    def header(self, segment: str) -> SegmentHeader | None:
        """Return what holds for a segment's entries, or None where no index names it, or one that does is damaged.

        Whoever asks will trust an entry's row, which no content hash covers.
        """
        if self._headers is None:
            unsound = {s.segment for index in self.indexes if not index.checked for s in index.segments}
            self._headers = {name: h for name, h in self.segments(hidden=True).items() if name not in unsound}
        return self._headers.get(segment)

    def by_segment(self) -> dict[str, tuple[Index, NDArray[np.int64]]]:
        """Return where the rows of each segment are: an index that names it, and its rows there, of all its entries."""
        found: dict[str, tuple[Index, NDArray[np.int64]]] = {}
        for index in self.indexes:
            order = np.argsort(index.records["segment"], kind="stable")
            numbers, firsts = np.unique(index.records["segment"][order], return_index=True)
            for number, rows in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True):
                if number < len(index.segments):
                    found.setdefault(index.segments[number].segment, (index, rows))
        return found

    def residues(self) -> Counter[str]:
        """Return the residues of all entries of each segment."""
        totals: Counter[str] = Counter()
        seen: set[str] = set()
        for index in self.indexes:
            numbers = np.minimum(index.records["segment"], len(index.segments))  # damage may be any number
            sums = np.bincount(numbers, index.records["length"], len(index.segments))
            for header, total in zip(index.segments, sums, strict=False):
                if header.segment not in seen:  # merged by two at the same time
                    totals[header.segment] += int(total)
            seen |= {s.segment for s in index.segments}
        return totals

    def quarantined(self) -> Counter[str]:
        """Return how many entries of each segment are quarantined."""
        counts: Counter[str] = Counter()
        seen: set[str] = set()
        for loaded in filter(None, self._loaded.values()):
            names = [s.segment for s in loaded.index.segments]
            dead = Counter(names[loaded.index.record(int(row))[6]] for row in loaded.dead)
            counts.update({name: number for name, number in dead.items() if name not in seen})
            seen |= set(names)
        return counts

    def refresh(self) -> None:
        """See what other processes published and hid since, and forget what is gone.

        Raises
        ------
        IntegrityError
            When an event is damaged.
        StorageError
            When the store can't be read.

        """
        self.refresh_events()
        if all(self._store.unchanged(folder, self._marks.get(folder)) for folder in (INDEXES, RUNS)):
            return
        for _ in range(_ATTEMPTS):
            marks = {folder: self._store.mark(folder) for folder in (INDEXES, RUNS)}
            # Indexes first: what is merged away in between is in a run that is listed then.
            names = {
                f"{folder}/{n}"
                for folder, kind in _KINDS.items()
                for n in self._store.names(folder)
                if n.endswith(kind)
            }
            if self._load(names):
                self._marks |= marks
                return
        raise StorageError(f"the indexes of {self._store.location} change faster than they can be read", "try again")

    def refresh_events(self) -> None:
        """See what was hidden since; on the way of every read, and so only one question to the store."""
        folder = event_file.FOLDER
        if not self._store.unchanged(folder, self._marks.get(folder)):
            mark = self._store.mark(folder)
            names = event_files(self._store)
            for name in self._events.keys() ^ names:
                if self._events.pop(name, None) is None:
                    with suppress(FileNotFoundError):  # removed since
                        self._events[name] = read_event(self._store, name)
                self.changes += 1  # last: another thread may apply what has changed so far
            self._marks[folder] = mark
        applied = self.changes + (self.beside.changes if self.beside else 0)
        if applied != self._applied:
            for loaded in self._loaded.values():
                if loaded:
                    self._hide(loaded)
            self._applied = applied

    def _load(self, names: set[str]) -> bool:
        """Open what is new of these files; False where one of them is gone, and the list is old."""
        self._newest = self._headers = None
        for name in self._loaded.keys() - names:
            del self._loaded[name]
        for name in sorted(names - self._loaded.keys()):
            try:
                index = Index.read(self._store, name)
            except FileNotFoundError:
                return False
            except (StorageError, ValueError, KeyError, TypeError) as error:
                self._pass_over(name, error)
                continue
            loaded = _Loaded(index, np.zeros(len(index.segments), dtype=bool), np.zeros(0, dtype=np.int64))
            self._hide(loaded)
            self._loaded[name] = loaded
        return True

    def _pass_over(self, name: str, error: Exception) -> None:
        """Leave out an index that can't be read; it is warned of once."""
        _log.warning("%s", error)
        self._loaded[name] = None

    def forget(self) -> None:
        """See nothing, until the next `refresh`."""
        self._newest = self._headers = None
        self._loaded.clear()
        self._marks.clear()

    def _hide(self, loaded: _Loaded) -> None:
        """Note which segments and rows of an index events hide."""
        events, index = self.events, loaded.index
        loaded.hidden = np.array([any(e.hides(s) for e in events) for s in index.segments], dtype=bool)
        dead: list[int] = []
        numbers = {s.segment: n for n, s in enumerate(index.segments)}
        for event in events:
            if event.kind != "quarantined":
                continue
            for segment, keys in event.segments.items():
                if segment in numbers and keys:
                    _, rows, its = index.locate(key_array(sorted(keys)))
                    dead += rows[its == numbers[segment]].tolist()
        loaded.dead = np.array(sorted(set(dead)), dtype=np.int64)
        # What was not checked when it was opened is looked at row by row.
        loaded.whole = not dead and not loaded.hidden.any() and index.nbytes <= CHECKED_BYTES

    def find(self, keys: Sequence[str], *, mine: Callable[[], str], only_mine: bool = False) -> Found:
        """Return the visible entries of some keys.

        Parameters
        ----------
        keys
            Each once.
        mine
            Returns the device class whose entries come first; asked only where those of one key may differ.
        only_mine
            Leave out the others.

        """
        wanted = key_array(keys)
        order = np.argsort(wanted["high"])  # neighbours in a search are neighbours in memory
        ordered = wanted[order]
        all_loaded = [loaded for loaded in self._loaded.values() if loaded]
        parts = [self._rows(loaded, ordered) for loaded in all_loaded]
        none = np.zeros(0, dtype=np.int64)
        place = np.concatenate([p for p, _ in parts] or [none])
        row = np.concatenate([r for _, r in parts] or [none])
        source = np.repeat(np.arange(len(parts)), [len(p) for p, _ in parts])
        position = order[place]
        found = Found(keys, position, source, row, [loaded.index for loaded in all_loaded])
        sort = np.argsort(position)
        repeated = len(position) > 1 and bool((np.diff(position[sort]) == 0).any())
        if only_mine or repeated:
            sort = _preferred(found, all_loaded, mine, only_mine=only_mine)
        return Found(keys, position[sort], source[sort], row[sort], found.indexes)

    def find_one(self, key: str) -> Entry | None:
        """Return the newest visible entry of one key, where all entries are of one device class; else None.

        None also where the key has no entry that was seen at the last `refresh`.
        """
        place = self.locate_one(key)
        return entry_of(key, *place) if place else None

    def locate_one(self, key: str) -> tuple[Index, Record] | None:
        """Return the index that has what `find_one` returns, and what it says of it."""
        newest = self._newest
        if newest is None:
            classes = {s.attestation.device_class for one in self._loaded.values() if one for s in one.index.segments}
            ours = (one for one in self._loaded.values() if one and len(one.published)) if len(classes) < 2 else ()
            newest = self._newest = sorted(ours, key=lambda one: -int(one.published.max()))
        high, low = key_halves(key)
        for one in newest:
            found = one.index.find_one(high, low)
            if found and (one.whole or one.shows(*found)):
                return one.index, found[1]
        return None

    @staticmethod
    def _rows(loaded: _Loaded, ordered: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the places of the keys that an index has and shows, and their rows."""
        if not len(loaded.index.high):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        place, rows, numbers = loaded.index.locate(ordered)
        # A number beyond the segments is damage in a run that was too large to be checked when it was opened.
        known = numbers < len(loaded.index.segments)
        if loaded.hidden.any():
            known[known] = ~loaded.hidden[numbers[known]]
        if not known.all():
            place, rows = place[known], rows[known]
        if len(loaded.dead):
            alive = ~np.isin(rows, loaded.dead)
            place, rows = place[alive], rows[alive]
        return place, rows

    def merge_due(self) -> bool:
        """Say whether there are so many index files that look-ups would be quicker with fewer."""
        return sum(name.startswith(f"{INDEXES}/") for name in self._loaded) >= MERGE_AT

    def merge(self, *, everything: bool = False) -> None:
        """Merge the index files, and the runs that are not much larger, into one run; leave out what is retired.

        Whoever is killed, or does it at the same time as another, loses nothing: files go when what they say is in a run.

        Raises
        ------
        StorageError
            When the run can't be written.

        """
        # What is damaged would get a checksum that says it is sound.
        sound = {name: one.index for name, one in self._loaded.items() if one and one.index.checked}
        new, runs = (
            {name: len(index.high) for name, index in sound.items() if name.startswith(f"{folder}/")}
            for folder in (INDEXES, RUNS)
        )
        chosen = [sound[name] for name in to_merge(new, runs, everything=everything)]
        if not chosen:
            return
        file = self._store.begin(f"{RUNS}/{time.time_ns():020d}-{secrets.token_hex(6)}.run")
        try:
            if merge_indexes(file.path, chosen, self.retired):
                file.publish()
        except StorageError:
            raise  # it says already what it is about
        except OSError as error:
            raise storage_error("write", file.path, error) from error
        finally:
            file.discard()
        for index in chosen:
            self._store.remove(index.name)
        self.refresh()


def _segment_numbers(loaded: _Loaded, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
    numbers: NDArray[np.uint32] = loaded.index.records["segment"][rows]
    return numbers


def _preferred(
    found: Found, all_loaded: Sequence[_Loaded], mine: Callable[[], str], *, only_mine: bool
) -> NDArray[np.int64]:
    """Return the order of entries: by key, own device class first, then the newest; with `only_mine` no others."""
    classes: list[str] = []
    published = np.zeros(len(found.row), dtype=np.int64)
    number = np.zeros(len(found.row), dtype=np.int64)
    for source, loaded in enumerate(all_loaded):
        here = found.source == source
        segments = _segment_numbers(loaded, found.row[here])
        published[here] = loaded.published[segments]
        number[here] = segments + len(classes)
        classes += [s.attestation.device_class for s in loaded.index.segments]
    used = {classes[n] for n in np.unique(number)}
    own = mine() if only_mine or len(used) > 1 else None
    foreign = np.array([c != own for c in classes], dtype=bool)[number]
    order = np.lexsort((-published, foreign, found.position))
    return order[~foreign[order]] if only_mine else order
