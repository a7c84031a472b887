"""One version: what its tags say, and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.pointers import Pointer, pointer_at
from proteus_pipeline.registry.records import VersionRecord
from proteus_pipeline.registry.refs import LEDGER, enter
from proteus_pipeline.registry.weights import DvcCache

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class ModelVersion:
    """One version: what its tag says, and where its weights lie.

    Attributes
    ----------
    name, version
        Of the model.
    tag, commit
        The git tag, and the commit it points to.
    record
        What the tag says; None for a tag that ``gto register`` or a person made.
    current
        Whether ``NAME`` and ``NAME@current`` mean this version.
    damage
        Why the record can't be read, in a listing; no other call returns such a version.
    oid
        The tag's own object.
    time
        When it was registered, in seconds since 1970.

    """

    name: str
    version: str
    tag: str
    commit: str
    record: VersionRecord | None
    current: bool
    root: Path
    damage: IntegrityError | None = None
    oid: str = ""
    time: int = 0

    @property
    def reference(self) -> str:
        """The exact reference, ``NAME@v1.2.3``."""
        return f"{self.name}@v{self.version}"

    @cached_property
    def pointer(self) -> Pointer:
        """The DVC pointer at the tag's commit.

        Raises
        ------
        IntegrityError
            When there is none, it is not the one that the record was made with, or the tag is not what it was.

        """
        if self.damage:
            raise self.damage
        git = Git(self.root)
        pointer, entered = pointer_at(git, self.commit, self.name, LEDGER + self.tag)
        if entered is not None and entered != self.oid:
            raise IntegrityError(
                f"tag {self.tag} was moved or edited: it is {self.oid[:12]} now, and was {entered[:12]} when it was made",
                "proteus model verify --repair puts it back",
            )
        if self.record and self.record.weights["md5"] != pointer.md5:
            raise IntegrityError(
                f"tag {self.tag} points to weights {pointer.md5}, and its record says {self.record.weights['md5']}",
                "fetch the tag again from a remote",
            )
        if entered is None:
            enter(git, self.tag, self.oid)
        return pointer

    @property
    def remedy(self) -> str:
        """What to do about damaged weights."""
        return f"proteus model verify {self.reference} --repair"

    @cached_property
    def files(self) -> dict[str, Path]:
        """Where each file of the weights lies in the DVC cache, fetched where one is missing.

        Raises
        ------
        StorageError
            When they are neither in the cache, nor in a backup or a remote.

        """
        if files := DvcCache(self.root).files(self.pointer):
            return files
        from proteus_pipeline.registry.supply import supply

        return supply(self.root, self.pointer, self.reference)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What `fresh` returns, once: StorageError and IntegrityError as it says."""
        return self.fresh()

    def fresh(self) -> Checkpoint:
        """Open the version's tensors, memory-mapped from the DVC cache; each is checked when it is first touched.

        Raises
        ------
        StorageError
            When the weights are nowhere.
        IntegrityError
            When they are not what the record says: here, or when a tensor is touched.

        """
        from proteus_pipeline.models.mapped import open_mapped
        from proteus_pipeline.models.reading import read_files

        if self.record:
            return open_mapped(self.files, self.record.components, f"{self.reference} in the DVC cache", self.remedy)
        return read_files(self.files, self.reference)
