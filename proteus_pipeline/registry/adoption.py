"""Giving a version that ``gto register`` or a person tagged the record that ours have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proteus_pipeline.errors import StorageError, VersionConflictError
from proteus_pipeline.registry.publishing import author, counter, now_text, tag_time
from proteus_pipeline.registry.records import VersionRecord
from proteus_pipeline.registry.refs import exclusive, publish
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.weights import sha256_of

if TYPE_CHECKING:
    from proteus_pipeline.registry.versions import ModelVersionManager


def adopt(manager: ModelVersionManager, name: str, number: str, *, reason: str = "") -> ModelVersion:
    """Read a version's weights where DVC has them, and publish what they are beside its tag, which stays as it is.

    Raises
    ------
    VersionNotFoundError
        When there is no such version.
    VersionConflictError
        When it has a record of its own.
    ModelError
        When its weights are no model this package knows.

    """
    history = manager.history(name)
    version = manager.get_version(name, number)
    if version.record:
        raise VersionConflictError(
            f"{version.reference} has a record already", f"proteus model show {version.reference}"
        )
    checkpoint, pointer, files = version.checkpoint, version.pointer, version.files
    # Everything is read before anything is said of it.
    components, digest = checkpoint.digests, checkpoint.model_digest
    weights = {
        "md5": pointer.md5,
        "sha256": sha256_of(files),
        "size": pointer.size or sum(p.stat().st_size for p in files.values()),
        "files": pointer.files,
    }
    git = manager.ensure_home()
    with exclusive(git):
        history = manager.history(name)
        record = VersionRecord(
            name=name,
            version=number,
            sequence=history.next_sequence,
            model_digest=digest,
            components=components,
            architecture=checkpoint.architecture.identity(),
            weights=weights,
            source={"origin": f"tag {version.tag} at {version.commit}"},
            author=author(git),
            time=now_text(),
            reason=reason,
        )
        tag = f"{name}@v{number}%{counter(record.sequence)}"
        oid = git.make_tag(tag, version.commit, record.message(), tag_time(history, "adopted", number))
        if not publish(git, {tag: oid}):
            raise StorageError(f"tag {tag} was made meanwhile", "run the command again")
    return manager.get_version(name, number)
