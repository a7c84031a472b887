"""Files that are either whole or absent: written beside their place, flushed to the disk, and renamed into it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from proteus_pipeline.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"
"""How a file that was never published is called: whoever lists or sweeps a folder may pass over these names."""

_FULL = "free space there, or choose another location"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another location",
    errno.EACCES: "ask for permission there, or choose another location",
    errno.EPERM: "ask for permission there, or choose another location",
    errno.EROFS: "choose a location that can be written to",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "check the path: it is a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk",
}
# A folder can't be flushed on some network file systems; the rename itself has been done by then.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}
# How long one waits for a lock, seconds: an append takes others some 50 microseconds.
_PATIENCE, _FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 0.0002, 0.005
# Only writing gives these, so that they can be named even when they come out of another library.
_WRITE_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def storage_error(action: str, path: Path | str, error: OSError) -> StorageError:
    """Return the error that says what could not be done (``write``, ``read``) to which path, why, and the remedy.

    >>> str(storage_error("write", Path("a/b"), OSError(errno.ENOSPC, "No space left on device")))
    'cannot write a/b: no space left on device; free space there, or choose another location'
    """
    reason = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "check the location")
    return StorageError(f"cannot {action} {path}: {reason[:1].lower()}{reason[1:]}", remedy)


def write_atomic(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old bytes or the new ones.

    Parameters
    ----------
    path
        The file; its folders are made, and what was there is replaced.
    data
        All its bytes.
    mode
        Permission bits; None for what the umask gives.

    Raises
    ------
    StorageError
        When it could not be written; nothing is left behind, and what was at `path` stays.

    """
    with atomic_path(path) as tmp:
        try:
            with tmp.open("xb") as file:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                file.write(data)
        except OSError as error:
            raise storage_error("write", path, error) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a name in the same folder for the body to write a file to; publish it as `path` when the body succeeds.

    The name ends in `path`'s suffix, for the libraries that go by it. Whatever the body raises, KeyboardInterrupt
    included, the temporary file is removed and `path` stays as it was.

    Raises
    ------
    StorageError
        When the folder can't be made, the disk is full or read-only, or the file can't be published.

    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("write", path, error) from error
    tmp = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{path.suffix}")
    try:
        yield tmp
        replace_atomic(tmp, path)
    except BaseException as error:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _WRITE_FAILED:
            raise storage_error("write", path, error) from error
        raise


def replace_atomic(tmp: Path, path: Path) -> None:
    """Publish a finished file under its name: flush it, rename it over `path`, flush the folder.

    Both must lie on one file system.

    Raises
    ------
    StorageError
        When any of that fails; `tmp` is left to the caller.

    """
    try:
        _fsync(tmp)
        tmp.replace(path)
        try:
            _fsync(path.parent)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
    except OSError as error:
        raise storage_error("write", path, error) from error


def lock(descriptor: int) -> bool:
    """Lock a file or a folder that processes append to one after another; return False where there are no locks.

    The lock ends with the descriptor, and with the process, however it dies.

    Parameters
    ----------
    descriptor
        Of the open file; on network file systems it has to be open for writing.

    Raises
    ------
    OSError
        When another process does not let go of it: it may have been stopped, and no work waits for its own counts.

    """
    deadline, pause = time.monotonic() + _PATIENCE, _FIRST_PAUSE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        except OSError:
            return False
        else:
            return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal.

    Raises
    ------
    StorageError
        When it can't be read.

    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise storage_error("read", path, error) from error


def md5_file(path: Path) -> str:
    """Return a file's MD5, in hexadecimal: the name DVC knows it by, and no protection against anyone.

    Raises
    ------
    StorageError
        When it can't be read.

    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise storage_error("read", path, error) from error


class OpenFile:
    """A file opened for reading, whatever its name is by then, and closed when the last who reads it lets go of it.

    Attributes
    ----------
    descriptor
        Of the open file.
    size
        In bytes, when it was opened.

    """

    def __init__(self, path: str | Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.status = os.fstat(self.descriptor)
        self.size = self.status.st_size

    def is_unchanged(self) -> bool:
        """Say whether nobody has written to it since; a write through a map of it may be seen late, or never.

        Not, where its file system can't say.
        """
        try:
            return _written(os.fstat(self.descriptor)) == _written(self.status)
        except OSError:
            return False

    def is_at(self, path: Path) -> bool:
        """Say whether it is the file that a path means now, unchanged."""
        found = path.stat()
        return os.path.samestat(found, self.status) and _written(found) == _written(self.status)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # it may never have been opened
            os.close(self.descriptor)


def _written(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


@lru_cache
def file_system(device: int, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the kind of file system of a device number (``st_dev``), as ``ext4`` or ``nfs4``; empty where nobody says."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2:3] == [number]:
                return after.partition(" ")[0]
    return ""


def stays_mapped(device: int) -> bool:
    """Say whether a mapped file of a device (``st_dev``) can be read to its end whoever removes it meanwhile.

    On a network file system that keeps no removed file for who has it open, whoever touches a page that was not read yet is
    killed.
    """
    return not file_system(device).startswith(("nfs", "cifs", "smb", "fuse", "9p"))
