"""Where immutable files lie, by name: what the embedding cache needs of a place, and a local folder as one.

Names are ``folder/file``, of files that are written once, under names that nobody else writes, and then never changed: so
no place needs locks, and every place that can create and list files will do.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from proteus_pipeline.errors import StorageError
from proteus_pipeline.stores.files import (
    TEMPORARY_PREFIX,
    OpenFile,
    replace_atomic,
    stays_mapped,
    storage_error,
    write_atomic,
)

_OPEN_FILES = 128
# A folder's time is that of a clock which ticks every few milliseconds: a file may appear in the tick of the last listing.
_TICK_NS = 50_000_000
_ABSENT = -1


class Unfinished(Protocol):
    """A file that is being written, and not there yet."""

    path: Path
    """Where to write it, on this machine."""

    def take(self, path: Path) -> bool:
        """Have another file of this machine sent in place of one at `path`; False where it has to be written there.

        That file is left as it is, and must stay so until `publish` returns.
        """

    def publish(self) -> None:
        """Make it whole and there: when this returns, it survives a crash.

        Raises
        ------
        StorageError
            When it can't be; it is then not there.

        """

    def discard(self) -> None:
        """Forget it; does nothing after `publish`."""


class Store(Protocol):
    """A place for immutable files.

    All methods raise `StorageError` where the place can't be read or written; `FileNotFoundError` for a name that is
    not there.
    """

    location: str

    def names(self, folder: str) -> set[str]:
        """Return the names of the files in a folder; none where it does not exist."""

    def unchanged(self, folder: str, since: object) -> bool:
        """Say whether a folder certainly has the files that it had when `mark` returned `since`."""

    def mark(self, folder: str) -> object:
        """Return what `unchanged` takes; call it before `names`."""

    def size(self, name: str) -> int:
        """Return a file's bytes."""

    def read(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """Return bytes of a file, all from `offset` where `nbytes` is None; fewer where it ends before."""

    def view(self, name: str, offset: int, nbytes: int) -> memoryview:
        """Return what `read` does, not copied where that can be: it may keep its neighbours in memory."""

    def at_hand(self, name: str) -> AbstractContextManager[Path | None]:
        """Give a path at which a file can be read on this machine, also where it is removed meanwhile; None for none."""

    def read_many(self, name: str, offsets: list[int], buffers: list[memoryview]) -> list[bool]:
        """Fill buffers with bytes of a file from offsets, and say of each whether there were enough."""

    def map(self, name: str) -> memoryview | mmap.mmap:
        """Return a whole file's bytes without reading them all, where the place can do that."""

    def prefetch(self, name: str) -> None:
        """Ask for a file to be read soon, where the place can do that."""

    def begin(self, name: str) -> Unfinished:
        """Begin to write a file."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole and at once."""

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is removed already."""


class _LocalFile:
    def __init__(self, target: Path) -> None:
        self._target = target
        self._done = False
        self.path = target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{target.suffix}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error("write", target, error) from error

    def take(self, path: Path) -> bool:  # noqa: ARG002 - another folder's copy is there to be another one
        return False

    def publish(self) -> None:
        try:
            replace_atomic(self.path, self._target)
        except StorageError:
            # Flushing its folder may fail after it has appeared: then it is not certain to survive, and not published.
            with suppress(OSError):
                self._target.unlink(missing_ok=True)
            self.discard()
            raise
        self._done = True

    def discard(self) -> None:
        if not self._done:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


class LocalStore:
    """A folder on this machine.

    Parameters
    ----------
    root
        The folder; created by the first write.

    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.location = str(root)
        # Opening a file takes as long as reading a vector from it.
        self._open: dict[str, OpenFile] = {}
        self._lock = threading.Lock()

    def names(self, folder: str) -> set[str]:
        path = self.root / folder
        try:
            return {n for n in os.listdir(path) if not n.startswith(".")}  # noqa: PTH208 - ten times as fast as iterdir
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise storage_error("read", path, error) from error

    def mark(self, folder: str) -> object:
        try:
            changed = os.stat(f"{self.location}/{folder}").st_mtime_ns  # noqa: PTH116 - on the way of every look-up
        except FileNotFoundError:
            return _ABSENT
        except OSError:
            return None
        # A mark that is too fresh is none: what comes in the same tick would go unseen.
        return changed if time.time_ns() - changed > _TICK_NS else None

    def unchanged(self, folder: str, since: object) -> bool:
        if since is None:
            return False
        path = f"{self.location}/{folder}"
        try:
            # A folder that is not there is asked for on the way of every read too: an exception takes three times as long.
            if since == _ABSENT and not os.access(path, os.F_OK):
                return True
            return os.stat(path).st_mtime_ns == since  # noqa: PTH116
        except FileNotFoundError:
            return since == _ABSENT
        except OSError:
            return False

    def size(self, name: str) -> int:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error("read", self.root / name, error) from error

    def read(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        try:
            if nbytes is None:
                with (self.root / name).open("rb") as file:
                    file.seek(offset)
                    return file.read()
            opened = self._open.get(name) or self._opened(name)
            left = opened.size - offset
            if nbytes <= left:
                return os.pread(opened.descriptor, nbytes, offset)
            # A damaged index may ask for more than there is, or than any memory holds.
            return os.pread(opened.descriptor, left, offset) if left > 0 else b""
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error("read", self.root / name, error) from error

    def view(self, name: str, offset: int, nbytes: int) -> memoryview:
        return memoryview(self.read(name, offset, nbytes))

    @contextmanager
    def at_hand(self, name: str) -> Iterator[Path | None]:
        try:
            opened = self._opened(name)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error("read", self.root / name, error) from error
        # Who opens that has what was opened here, whatever its name is or isn't by then.
        path = Path(f"/proc/self/fd/{opened.descriptor}")
        yield path if os.path.exists(path) else None  # noqa: PTH110 - Path's raises where it may not be looked at

    def read_many(self, name: str, offsets: list[int], buffers: list[memoryview]) -> list[bool]:
        try:
            opened = self._opened(name)
            pairs = zip(offsets, buffers, strict=True)
            return [o < opened.size and os.preadv(opened.descriptor, (b,), o) == len(b) for o, b in pairs]
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error("read", self.root / name, error) from error

    def _opened(self, name: str) -> OpenFile:
        with self._lock:
            known = self._open.get(name)
            if known is None:
                known = self._open[name] = OpenFile(f"{self.location}/{name}")
                if len(self._open) > _OPEN_FILES:
                    del self._open[next(iter(self._open))]  # the oldest: to note each use took a tenth of a read
            return known

    def map(self, name: str) -> memoryview | mmap.mmap:
        try:
            with (self.root / name).open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size == 0:
                    return memoryview(b"")
                if not stays_mapped(status.st_dev):
                    return memoryview(file.read())
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error("read", self.root / name, error) from error

    def prefetch(self, name: str) -> None:
        with suppress(OSError, AttributeError):  # not on every system
            os.posix_fadvise(self._opened(name).descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def _path(self, name: str) -> Path:
        """Return where a file lies: in a folder of this one, whatever its name says."""
        folder, _, file = name.partition("/")
        if not folder or not file or folder.startswith(".") or "/" in file or "\0" in name or file in {".", ".."}:
            raise StorageError(f"{name!r} is no name of a file in {self.root}", "look at who wrote it there")
        return self.root / folder / file

    def begin(self, name: str) -> Unfinished:
        return _LocalFile(self._path(name))

    def write(self, name: str, data: bytes) -> None:
        try:
            write_atomic(self._path(name), data)
        except StorageError:
            with suppress(OSError):  # as in publishing: flushing the folder may fail after the file has appeared
                self._path(name).unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)
        path = self._path(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("remove", self.root / name, error) from error
