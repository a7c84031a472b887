"""DVC's remotes, one object at a time, by DVC's own file systems: whatever ``dvc remote add`` takes (a folder, S3, SSH, ...).

DVC's own fetch puts what arrives into the cache unchecked, read-only, and trusts it from then on; and what a remote is
called belongs to the commit it reads. Here an object is checked before it is published, and the remotes are those of the
repository's configuration now, whatever was configured when a version was tagged.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.weights import remote_names

_SECRET = re.compile(r"//[^/@\s]+@")


class DvcRemote:
    """One remote of the repository at `root`."""

    def __init__(self, root: Path, name: str) -> None:
        self._root = root
        self.name = name

    @cached_property
    def _objects(self) -> Any:
        # dvc takes a second to import: only when something is missing, or to be sent.
        from dvc.repo import Repo

        with self._named("open"), contextlib.closing(Repo(str(self._root))) as repo:
            return repo.cloud.get_remote_odb(self.name, "fetch")

    def size(self, md5: str) -> int | None:
        """Return an object's size in bytes, or None when the remote does not have it.

        Raises
        ------
        StorageError
            When the remote can't be asked.

        """
        with self._named("ask"):
            try:
                return int(self._objects.fs.size(self._objects.oid_to_path(md5)))
            except FileNotFoundError:
                return None

    def fetch(self, md5: str, target: Path) -> bool:
        """Copy an object to `target`, unchecked; False when the remote does not have it.

        Raises
        ------
        StorageError
            When the transfer fails.

        """
        with self._named("fetch from"):
            try:
                self._objects.fs.get_file(self._objects.oid_to_path(md5), str(target))
            except FileNotFoundError:
                return False
        return True

    def push(self, md5: str, source: Path) -> None:
        """Copy an object to the remote; it is whole there, or absent.

        Raises
        ------
        StorageError
            When the transfer fails, or the remote does not hold it whole afterwards.

        """
        with self._named("push to"):
            from dvc.fs import localfs

            self._objects.add(str(source), localfs, md5, hardlink=False)
        if self.size(md5) != source.stat().st_size:
            raise StorageError(f"remote {self.name} does not hold {md5} after it was sent", "push it again")

    def remove(self, md5: str) -> None:
        """Remove an object, as a damaged one must be before a sound one is sent.

        Raises
        ------
        StorageError
            When the remote refuses.

        """
        with self._named("remove from"):
            self._objects.fs.rm_file(self._objects.oid_to_path(md5))

    @contextlib.contextmanager
    def _named(self, action: str) -> Iterator[None]:
        """Turn whatever a storage library raises into one line that names the remote, and no secret of its address."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StorageError(
                f"cannot {action} DVC remote {self.name}: {_SECRET.sub('//', line)[:200]}",
                "check it: dvc remote list, and its credentials",
            ) from error


def remotes(root: Path) -> list[DvcRemote]:
    """Return the configured remotes, the default one first."""
    return [DvcRemote(root, name) for name in remote_names(root)]
