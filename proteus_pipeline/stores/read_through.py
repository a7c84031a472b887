"""A far place, read through a folder here.

Whole files are kept in the folder, parts of others are read ahead, and a place that does not answer is left alone for a while.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.identity import digests
from proteus_pipeline.stores.files import TEMPORARY_PREFIX, storage_error
from proteus_pipeline.stores.ranges import Range, cut, joined
from proteus_pipeline.stores.store import LocalStore, Unfinished

if TYPE_CHECKING:
    import mmap

    from proteus_pipeline.stores.s3 import S3Store

T = TypeVar("T")
Ahead = dict[Range, list[tuple[Future[memoryview], int]]]
"""Ranges that are under way: of each the pieces of files that it lies in, and where they begin."""
_log = logging.getLogger(__name__)
# How old a listing may be. An index or an invalidation that is published there is seen so much later.
BELIEVED_SECONDS = 1.0
# How long a place that failed is not asked again.
LEFT_ALONE_SECONDS = 30.0
# A file in the making that is older is of a process that was killed.
_UNFINISHED_SECONDS = 3600.0
# Names of files that are kept end in the digest of what they hold.
_DIGEST_DIGITS = 32


class _Sent:
    """A file on its way to a store far away, as `ReadThrough` asks that."""

    def __init__(self, tier: ReadThrough, file: Unfinished) -> None:
        self._tier, self._file = tier, file
        self.path = file.path

    def take(self, path: Path) -> bool:
        return self._file.take(path)

    def publish(self) -> None:
        self._tier.ask(self._file.publish, writing=True)

    def discard(self) -> None:
        self._file.discard()


class ReadThrough:
    """A store far away, with a tier of its files here.

    Parameters
    ----------
    far
        The store.
    folder
        Where files that are mapped are kept, for every process that reads the same place through it.
    max_bytes
        What the folder may take; what was opened longest ago goes first. A larger file is refused.

    """

    def __init__(self, far: S3Store, folder: Path, max_bytes: int) -> None:
        self.far = far
        self.location = far.location
        self._folder, self._max_bytes = folder, max_bytes
        self._failed: StorageError | None = None
        self._again = 0.0
        # Of writing alone: who may not write there may read, and a hung upload takes longer than a read.
        self._unwritten: tuple[StorageError, float] | None = None
        self._listed: dict[str, dict[str, tuple[int, str]]] = {}
        self._before = threading.local()
        self._ahead: Ahead = {}
        # Python's collector may close a reader that nobody asks any more at any allocation, within the lock too.
        self._lock = threading.RLock()
        self._told = False

    def ask(self, request: Callable[[], T], *, writing: bool = False) -> T:
        """Return what a request gives; where the last one failed, ask nobody until some time has passed."""
        self._leave_alone(writing=writing)
        try:
            answer = request()
        except IntegrityError:
            raise
        except StorageError as error:
            again = time.monotonic() + LEFT_ALONE_SECONDS
            if writing:
                self._unwritten = error, again
            else:
                self._failed, self._again = error, again
            raise
        if writing:
            self._unwritten = None
        else:
            self._failed = None
        return answer

    def _leave_alone(self, *, writing: bool) -> None:
        """Raise what a request raised a moment ago; writing is left alone after reading failed, too."""
        now, failed, unwritten = time.monotonic(), self._failed, self._unwritten
        if not (failed and now < self._again):
            failed = unwritten[0] if writing and unwritten and now < unwritten[1] else None
        if failed:
            # Said anew: an error that is raised again and again keeps what each who raised it had in hand.
            raise StorageError(failed.what, failed.remedy)

    def names(self, folder: str) -> set[str]:
        before: dict[str, dict[str, tuple[int, str]]] = getattr(self._before, "listed", {})
        listed = before.pop(folder, None)
        self._listed[folder] = listed if listed is not None else self.ask(partial(self.far.sizes, folder))
        return set(self._listed[folder])

    @contextmanager
    def listing(self, folders: Sequence[str]) -> Iterator[None]:
        """List some folders at the same time, of which `names` will be asked within, each once, in this thread."""
        try:
            if folders:
                self._before.began = time.monotonic()
                # By threads of their own: those of the store may have a minute's work before them.
                with ThreadPoolExecutor(len(folders), "listing") as pool:
                    listed = self.ask(lambda: list(pool.map(self.far.sizes, folders)))
                self._before.listed = dict(zip(folders, listed, strict=True))
            yield
        finally:
            self._before.listed, self._before.began = {}, None

    def mark(self, folder: str) -> object:  # noqa: ARG002 - a Store's
        return getattr(self._before, "began", None) or time.monotonic()

    def unchanged(self, folder: str, since: object) -> bool:  # noqa: ARG002 - a Store's
        """Say whether a folder was listed a moment ago, and its place has answered since."""
        return isinstance(since, float) and self._failed is None and time.monotonic() - since < BELIEVED_SECONDS

    def size(self, name: str) -> int:
        return self.ask(partial(self.far.size, name))

    def read(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        if nbytes is None:
            return self.ask(partial(self.far.read, name, offset))
        return bytes(self.view(name, offset, nbytes))

    def view(self, name: str, offset: int, nbytes: int) -> memoryview:
        one = name, offset, nbytes
        with self._lock:
            coming = self._ahead.pop(one, None)
        if coming is not None:
            try:
                return joined([cut(self.ask(future.result), first, offset, nbytes) for future, first in coming])
            except CancelledError:
                pass  # by another one who had asked for a part of the same bytes
            except StorageError:
                for future, _ in coming:
                    future.cancel()  # of a place that does not answer nothing more is asked
                raise
        return self.ask(partial(self.far.view, name, offset, nbytes))

    def read_many(self, name: str, offsets: list[int], buffers: list[memoryview]) -> list[bool]:
        return self.ask(partial(self.far.read_many, name, offsets, buffers))

    def read_ahead(self, wanted: Sequence[Range], begun: Ahead | None = None) -> Ahead:
        """Begin to read ranges that `read` or `view` will be asked for, by few requests; their errors are theirs.

        Parameters
        ----------
        wanted
            The ranges.
        begun
            What an earlier call returned: what is under way of it is not asked for again.

        Returns
        -------
        dict
            What comes, roughly in the order in which it does; `forget_ahead` lets go of it.

        """
        if self._failed and time.monotonic() < self._again:
            return {}
        begun = begun or {}
        asked = begun.keys() & wanted
        under_way = {one: parts for one, parts in begun.items() if one in asked and self._ahead.get(one) is parts}
        coming = self.far.begin_ranges([one for one in wanted if one not in under_way])
        with self._lock:
            self._ahead.update(coming)
        return under_way | coming

    def forget_ahead(self, coming: Ahead) -> None:
        """Let go of what comes and was not asked for; what another reader has begun to read since is left to that."""
        mine = list(coming.items())
        with self._lock:
            for one, parts in mine:
                if self._ahead.get(one) is parts:
                    del self._ahead[one]
        left = {future for parts in list(self._ahead.values()) for future, _ in parts}
        for future in {future for _, parts in mine for future, _ in parts} - left:
            future.cancel()

    def bring(self, names: Iterable[str]) -> None:
        """Have files in the tier, several at a time, before `map` asks for each, where all have room."""
        needed = sum(size for listed in self._listed.values() for size, _ in listed.values())
        if needed > self._max_bytes:
            if not self._told:
                _log.warning(
                    "the indexes of %s take %s bytes, and are fetched again and again: raise cache.local_bytes",
                    self.location, f"{needed:,}",
                )  # fmt: skip
            self._told = True
            return
        missing = [name for name in names if self._kept(name) is None]
        with suppress(FileNotFoundError):  # merged meanwhile
            self.ask(lambda: self.far.together([partial(self._bring, name) for name in missing]))

    def at_hand(self, name: str) -> AbstractContextManager[None]:
        return self.far.at_hand(name)

    def map(self, name: str) -> memoryview | mmap.mmap:
        path = self._kept(name)
        if path is not None:
            with suppress(OSError):  # another process has just made room
                mapped = LocalStore(path.parent.parent).map(f"{path.parent.name}/{path.name}")
                if digests.of_bytes(memoryview(mapped)) == path.name[-_DIGEST_DIGITS:]:
                    os.utime(path)
                    return mapped
                path.unlink(missing_ok=True)  # damaged here: it is fetched again
        path = self.ask(partial(self._bring, name))
        return LocalStore(path.parent.parent).map(f"{path.parent.name}/{path.name}")

    def _stem(self, name: str) -> str:
        # By its ETag too: what was damaged there, and put right, is another file.
        folder, _, file = name.partition("/")
        etag = self._listed.get(folder, {}).get(file, (0, ""))[1]
        return digests.of_record("kept", [self.location, name, etag])

    def _kept(self, name: str) -> Path | None:
        stem = self._stem(name)
        return next(iter(sorted(self._folder.glob(f"{stem}-*"))), None) if self._folder.is_dir() else None

    def _bring(self, name: str) -> Path:
        """Copy a file into the tier, under its content's digest."""
        folder, _, file = name.partition("/")
        size = self._listed.get(folder, {}).get(file, (-1, ""))[0]
        size = self.far.size(name) if size < 0 else size
        if size > self._max_bytes:
            raise IntegrityError(
                f"{self.location}/{name} takes {size:,} bytes, and cache.local_bytes is {self._max_bytes:,}",
                "raise cache.local_bytes",
            )
        temporary = self._folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.far.fetch(name, temporary, size)
            kept = self._folder / f"{self._stem(name)}-{digests.of_file(temporary)}"
            with self._lock:
                self._make_room(size)
                temporary.replace(kept)
        except (StorageError, FileNotFoundError):
            raise
        except OSError as error:
            raise storage_error("write", self._folder, error) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return kept

    def _make_room(self, nbytes: int) -> None:
        """Remove what was opened longest ago, until so many bytes have room; who has it mapped keeps it."""
        files = []
        for path in self._folder.iterdir():
            with suppress(OSError):
                status = path.stat()
                if path.name.startswith(TEMPORARY_PREFIX) and time.time() - status.st_mtime < _UNFINISHED_SECONDS:
                    continue  # another one is fetching it
                files.append((status.st_mtime, status.st_size, path))
        total = nbytes + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                return
            with suppress(OSError):
                path.unlink(missing_ok=True)
            total -= size

    def prefetch(self, name: str) -> None:
        """Do nothing: what is far away is asked for when it is needed."""

    def begin(self, name: str) -> Unfinished:
        self._leave_alone(writing=True)
        return _Sent(self, self.far.begin(name))

    def write(self, name: str, data: bytes) -> None:
        self.ask(partial(self.far.write, name, data), writing=True)

    def remove(self, name: str) -> None:
        self.ask(partial(self.far.remove, name), writing=True)
