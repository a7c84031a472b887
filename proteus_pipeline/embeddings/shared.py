"""A group's cache beneath one's own, on this machine or in a bucket: read through, written back to, and done without."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from proteus_pipeline.embeddings.events import FOLDER as EVENTS
from proteus_pipeline.embeddings.exchange import copy_segment
from proteus_pipeline.embeddings.found import Entry
from proteus_pipeline.embeddings.index import INDEXES, RUNS, SegmentHeader
from proteus_pipeline.embeddings.publication import SEGMENTS
from proteus_pipeline.embeddings.reading import READING
from proteus_pipeline.embeddings.visible import Visible
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.identity import digests
from proteus_pipeline.stores.places import open_place, scheme_of
from proteus_pipeline.stores.ranges import Range
from proteus_pipeline.stores.read_through import Ahead, ReadThrough
from proteus_pipeline.stores.s3 import S3Store
from proteus_pipeline.stores.s3_access import PATIENT, QUICK, Patience

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_pipeline.stores.store import Store

R = TypeVar("R")
LOCAL_BYTES = 2 << 30
"""What the tier of a shared cache's files may take here, where nothing else is said."""
FOLDER = "shared"
_FOLDERS = (SEGMENTS, INDEXES, RUNS, EVENTS)
# Read ahead at a time, and twice this is in memory, or what it is decoded: neighbours among so many are read together, which
# is what makes it fast.
_AHEAD_BYTES = 256 << 20
# Read in one go: a future takes 2 kB, which is more than many a pooled entry does.
_BATCH_BYTES = 256 << 10
_log = logging.getLogger(__name__)

Coming = tuple[Future[list[R]], int]
"""What will be read of some keys' entries, and the place there of one of them."""


class DistantVisible(Visible):
    """What is seen of a cache in a bucket: nothing while it can't be asked, which is warned of once."""

    _told = False
    _tier: ReadThrough

    def __init__(self, tier: ReadThrough, above: Visible) -> None:
        super().__init__(tier, above)
        self._tier = tier

    def refresh(self) -> None:
        try:
            due = [f for f in (EVENTS, INDEXES) if not self._tier.unchanged(f, self._marks.get(f))]
            # Not with the runs: what is merged away while the indexes are listed must be in a run that is listed then. What was
            # published and hid another entry in between may hide it before it is seen itself: that one is then computed.
            with self._tier.listing(due):
                super().refresh()
        except StorageError as error:
            # Not even what was seen before: what hides it now is not known.
            self.forget()
            if not self._told:
                _log.warning("the shared cache is left out: %s", error)
            self._told = True
        else:
            self._told = False

    @property
    def due(self) -> bool:
        """Whether `refresh` would ask the place."""
        return not all(self._tier.unchanged(folder, self._marks.get(folder)) for folder in (EVENTS, INDEXES, RUNS))

    @contextmanager
    def expecting(self, entries: Iterable[Entry]) -> Iterator[Ahead]:
        """Have entries' bytes fetched while the body runs, in case it reads them; give what is under way."""
        wanted = [_range(one) for one in next(_in_groups(([entry] for entry in entries), _AHEAD_BYTES), [])]
        begun = self._tier.read_ahead(wanted)
        try:
            yield begun
        finally:
            self._tier.forget_ahead(begun)

    @property
    def left_out(self) -> bool:
        """Whether it could not be asked at the last `refresh`."""
        return self._told

    def _load(self, names: set[str]) -> bool:
        self._tier.bring(sorted(names - self._loaded.keys()))
        return super()._load(names)

    def _pass_over(self, name: str, error: Exception) -> None:
        if isinstance(error, StorageError) and not isinstance(error, IntegrityError):
            raise error  # it may be sound: the place does not answer
        super()._pass_over(name, error)


def open_tier(place: Store | Path | str, cache: Path, local_bytes: int, patience: Patience = PATIENT) -> Store:
    """Return the store of another cache; one in a bucket is read through a folder of this one.

    Parameters
    ----------
    place
        A path, an S3 URL, or a store.
    cache
        This cache's folder.
    local_bytes
        What its tier may take.
    patience
        For how long a server is asked.

    Raises
    ------
    ConfigError
        For a URL that can't be used.

    """
    store = open_place(place, patience) if isinstance(place, (str, Path)) else place
    if not isinstance(store, S3Store):
        return store
    return ReadThrough(store, cache / FOLDER / digests.of_record("place", store.location)[:16], local_bytes)


def open_shared(
    location: Path | str | None, cache: Path, local_bytes: int, above: Visible
) -> tuple[Store | None, Visible | None]:
    """Return the store of the cache beneath another one, and what is seen of it; None and None for none."""
    if local_bytes < 1:
        raise ConfigError(f"cache.local_bytes is {local_bytes}", "use a number of bytes above 0")
    if not location:
        return None, None
    store = open_tier(location, cache, local_bytes, QUICK)
    return store, DistantVisible(store, above) if isinstance(store, ReadThrough) else Visible(store, above)


def check_has_cache(store: Store) -> None:
    """Refuse a bucket's prefix that no cache was ever written to: a wrong URL would look like an empty cache.

    Raises
    ------
    StorageError
        When there is none, or the bucket can't be asked.

    """
    if isinstance(store, ReadThrough) and not any(store.names(folder) for folder in _FOLDERS):
        raise StorageError(f"{store.location} is no embedding cache", f"it has none of {', '.join(_FOLDERS)}")


def reading_ahead(
    store: ReadThrough,
    found: Sequence[Sequence[Entry]],
    here: Collection[str],
    read: Callable[[Sequence[Entry]], R],
    begun: Ahead,
) -> Iterator[R]:
    """Yield what is read of each key's entries, in their order.

    The bytes of those that lie far away are fetched many by one request, and read in the order in which they come: in that
    of the keys, nearly all of them would have to be here before the first few can be read.

    Parameters
    ----------
    store
        Where they lie.
    found
        The entries of each key, the best first.
    here
        The segments that need not be fetched.
    read
        What reads a key's entries; called in threads.
    begun
        What `DistantVisible.expecting` began of them.

    """
    if begun:
        unwanted = begun.keys() - map(_range, found)
        store.forget_ahead({one: begun[one] for one in unwanted})
    flying: deque[tuple[deque[Coming[R]], Ahead]] = deque()
    pool = ThreadPoolExecutor(READING, "reader")
    try:
        for part in _in_groups(found, _AHEAD_BYTES):
            wanted = [_range(entries) for entries in part if entries[0].segment not in here]
            flying.append((deque(), store.read_ahead(wanted, begun)))
            flying[-1][0].extend(_begin(pool, read, part, list(flying[-1][1])))
            if len(flying) > 1:
                yield from _results(flying[0][0])
                flying.popleft()
        while flying:
            yield from _results(flying[0][0])
            flying.popleft()
    finally:
        # Whoever stops asking: the entries that were not read.
        pool.shutdown(cancel_futures=True)
        for _, ahead in flying:
            store.forget_ahead(ahead)


def _begin(
    pool: ThreadPoolExecutor,
    read: Callable[[Sequence[Entry]], R],
    part: Sequence[Sequence[Entry]],
    coming: Sequence[Range],
) -> list[Coming[R]]:
    """Have each key's entries read, what is here first, then what comes first; return the results to come by their order."""
    turns = {one: turn for turn, one in enumerate(coming)}
    order = sorted(part, key=lambda entries: turns.get(_range(entries), -1))
    begun: dict[str, Coming[R]] = {}
    for batch in _in_groups(order, _BATCH_BYTES):
        future = pool.submit(lambda some: [read(entries) for entries in some], batch)
        begun |= {entries[0].key: (future, place) for place, entries in enumerate(batch)}
    return [begun[entries[0].key] for entries in part]


def _range(entries: Sequence[Entry]) -> Range:
    entry = entries[0]
    return f"{SEGMENTS}/{entry.segment}", entry.offset, entry.nbytes


def _results(coming: deque[Coming[R]]) -> Iterator[R]:
    while coming:
        yield _result(*coming.popleft())


def _result(future: Future[list[R]], place: int) -> R:
    return future.result()[place]  # and let go of it: it is an embedding, or some of them


def _in_groups(found: Iterable[Sequence[Entry]], most: int) -> Iterator[list[Sequence[Entry]]]:
    """Yield the entries of some keys in groups of about so many bytes."""
    group: list[Sequence[Entry]] = []
    nbytes = 0
    for entries in found:
        group.append(entries)
        nbytes += entries[0].nbytes
        if nbytes >= most:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


class WriteBack:
    """Publishes a cache's new segments to the shared one too.

    Parameters
    ----------
    here
        The cache's own store.
    place, store
        Where the shared one lies, and its store.

    """

    def __init__(self, here: Store, place: Path | str, store: Store) -> None:
        self._here, self._place, self._store = here, place, store
        # One of its own: segments are published in another thread than entries are looked up in.
        self._visible = Visible(store)
        self._told = False

    def __call__(self, header: SegmentHeader, keys: NDArray[np.void], records: NDArray[np.void]) -> None:
        """Copy a segment that was just published; where that fails, say what to run, once, and let the run go on."""
        try:
            copy_segment(self._here, self._store, header, keys, records)
            self._visible.refresh()
            merge_far(self._store, self._visible)
        except StorageError as error:
            if not self._told:
                where = f" {self._place}" if scheme_of(self._place) or Path(self._place).is_absolute() else " CACHE"
                _log.warning(
                    "new embeddings were kept here alone: %s; when it is there again, run: proteus cache push%s",
                    error.what, where,
                )  # fmt: skip
            self._told = True
        else:
            self._told = False


def merge_far(store: Store, visible: Visible) -> None:
    """Merge the indexes of a cache in a bucket where there are many, and may be removed: nobody else does."""
    if isinstance(store, ReadThrough) and visible.merge_due() and store.far.honours().removes:
        visible.merge()
