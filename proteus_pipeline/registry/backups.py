"""Backups of deleted versions: what their tags said, and their weights, outside DVC's cache.

::

    .proteus/backups/versions/NAME@vX.Y.Z.json    what is backed up; written last, so that it is whole when it is there
    .proteus/backups/files/md5/ab/cdef...         the objects, in DVC's layout: `dvc remote add` takes the folder as it is

Versions share what they have in common, as in the cache.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.registry.home import private_folder
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.records import OBJECT_MD5
from proteus_pipeline.registry.weights import Objects, quarantine
from proteus_pipeline.stores.files import storage_error, write_atomic

SCHEMA = 1
_log = logging.getLogger(__name__)
_RELEASED = ".released"


@dataclass(frozen=True)
class Backup:
    """One version's backup.

    Attributes
    ----------
    reference
        The version.
    tag
        Its tag's name.
    tag_object
        The tag as git has it, record and all, should git lose it; empty for a tag that is no object of its own.
    pointer
        Of the weights.
    objects
        The MD5 of each object, the directory's first.

    """

    reference: str
    tag: str
    tag_object: str
    pointer: Pointer
    objects: tuple[str, ...]


class Backups:
    """The backups of the registry at `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / ".proteus" / "backups"
        self.objects = Objects(self._folder / "files" / "md5")

    def make(self, backup: Backup, source: Objects) -> None:
        """Copy a version's objects, read each copy back, and write down what is there.

        Raises
        ------
        IntegrityError
            When an object of the version is damaged; there is no backup then.
        StorageError
            When one is missing, or the backup can't be written.

        """
        private_folder(self._root)
        self.objects.sweep()
        missing = [md5 for md5 in backup.objects if not source.object(md5).is_file()]
        if missing:
            raise StorageError(
                f"{backup.reference} can't be backed up: {missing[0]} is not in the DVC cache",
                f"proteus model pull {backup.reference}",
            )
        added = [md5 for md5 in backup.objects if not self.objects.object(md5).exists()]
        try:
            for md5 in backup.objects:
                if not self.objects.is_sound(md5):
                    quarantine(self._root, self.objects, md5)
                    self.objects.add(source.object(md5), md5)
            body = json.dumps({"schema": SCHEMA} | asdict(backup), indent=1, sort_keys=True)
            write_atomic(self.path(backup.reference), f"{body}\n".encode())
        except BaseException:
            # A disk that is full should not stay so for half a backup.
            self._remove(added)
            raise

    def find(self, reference: str) -> Backup | None:
        """Return a version's backup, or None; what it says is not checked against the objects.

        Raises
        ------
        IntegrityError
            When its description can't be read.

        """
        return self._read(self.path(reference))

    def list(self) -> list[Backup]:
        """Return every backup whose description can be read."""
        return [backup for _, backup in self._all() if isinstance(backup, Backup)]

    def unreadable(self) -> Sequence[tuple[Path, IntegrityError]]:
        """Return the descriptions that can't be read: damaged ones, or a later proteus's."""
        return [(path, error) for path, error in self._all() if isinstance(error, IntegrityError)]

    def _all(self) -> Iterator[tuple[Path, Backup | IntegrityError]]:
        versions = self._folder / "versions"
        for path in sorted([*versions.glob("**/*.json"), *versions.glob(f"**/*{_RELEASED}")]):
            try:
                backup = self._read(path)
            except IntegrityError as error:
                yield path.relative_to(versions), error
                continue
            if backup and path.suffix != _RELEASED:
                yield path, backup

    def is_verified(self, reference: str) -> bool:
        """Say whether a version's backup is there and every object of it is what its name says."""
        backup = self.find(reference)
        return backup is not None and all(self.objects.is_sound(md5) for md5 in backup.objects)

    def is_there(self, reference: str) -> bool:
        """Say whether a version's backup is there with all its objects, which are not read."""
        backup = self.find(reference)
        return backup is not None and all(self.objects.object(md5).exists() for md5 in backup.objects)

    def release(self, reference: str) -> None:
        """Forget a backup, and remove the objects that no other one needs; within `exclusive`."""
        path = self.path(reference)
        if path.exists():
            path.replace(path.with_suffix(_RELEASED))
        # Of one that a killed process was releasing, the rest goes too.
        for released in (self._folder / "versions").glob(f"**/*{_RELEASED}"):
            try:
                backup = self._read(released)
            except IntegrityError as error:
                _log.warning("%s, and stays with what it names: %s", error.what, error.remedy)
                continue
            self._remove(backup.objects if backup else ())
            released.unlink(missing_ok=True)

    def _remove(self, md5s: Iterable[str]) -> None:
        """Remove objects that no backup needs; none, while nobody can say what one needs."""
        if self.unreadable():
            return
        needed = {md5 for other in self.list() for md5 in other.objects}
        for md5 in set(md5s) - needed:
            self.objects.object(md5).unlink(missing_ok=True)

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(p.stat().st_size for p in self.objects.folder.rglob("*") if p.is_file())

    def path(self, reference: str) -> Path:
        """Return where a backup's description is, or would be."""
        return self._folder / "versions" / f"{reference}.json"

    @staticmethod
    def _read(path: Path) -> Backup | None:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.pop("schema") != SCHEMA:
                raise IntegrityError(f"{path} is of another schema than {SCHEMA}", "upgrade proteus_pipeline")
            value["pointer"] = Pointer(**value["pointer"])
            value["objects"] = tuple(value["objects"])
            return _checked(Backup(**value))
        except FileNotFoundError:
            return None
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise storage_error("read", path, error) from error
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path} is damaged ({error})", "restore it from a copy of the folder") from error


def _checked(backup: Backup) -> Backup:
    """Return a backup; refuse what is no object's name, which may lead out of the folder."""
    texts = (backup.reference, backup.tag, backup.tag_object, *backup.objects, backup.pointer.md5)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a value of the wrong type")
    if not all(OBJECT_MD5.fullmatch(md5) for md5 in (*backup.objects, backup.pointer.md5)):
        raise ValueError("an object's name that is none")
    return backup
