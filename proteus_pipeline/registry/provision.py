"""Making a version usable where it is not yet: its tag, its weights, or both, from where the catalogue says they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import IntegrityError, StorageError, VersionConflictError, VersionNotFoundError
from proteus_pipeline.identity.names import Reference
from proteus_pipeline.registry.fetching import fetch_events, offered
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.records import read_record
from proteus_pipeline.registry.refs import publish
from proteus_pipeline.registry.retirement import check_bytes
from proteus_pipeline.registry.supply import supply
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.versions import ModelVersionManager
from proteus_pipeline.registry.weights import DvcCache

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint
    from proteus_pipeline.models.sources import FetchedWeights, ModelEntry

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class _Fetched:
    """Weights on their way into the registry."""

    name: str
    weights: FetchedWeights

    @cached_property
    def checkpoint(self) -> Checkpoint:
        from proteus_pipeline.models.reading import read_checkpoint

        return read_checkpoint(self.weights.path)

    @property
    def source(self) -> Mapping[str, Any]:
        return {"origin": self.weights.origin, "sha256": dict(self.weights.sha256)}


def provide(
    manager: ModelVersionManager,
    reference: str,
    catalogue: Mapping[str, ModelEntry],
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> ModelVersion:
    """Return an exact version with its weights in the DVC cache, fetched and tagged when it is not there.

    Parameters
    ----------
    manager
        The registry.
    reference
        ``NAME@vX.Y.Z``, or floating, which must be registered here or on a git remote.
    catalogue
        Where weights come from, by model name: the files of conf/model/.
    progress
        Called with bytes done and bytes in all while files are fetched.
    force
        Check the weights to the last byte though they seem to be there, and bring sound ones where they are damaged.

    Raises
    ------
    VersionNotFoundError
        When it is neither registered, here or on a git remote, nor in the catalogue.
    StorageError
        When its weights can't be fetched.
    IntegrityError
        When what was fetched is not what the committed pointer or the tag says.

    """
    wanted = Reference.parse(reference)
    try:
        version = manager.resolve(reference)
    except VersionNotFoundError:
        entry = catalogue.get(wanted.name)
        if wanted.exact and entry and wanted.selector in entry.versions:
            return _register(manager, entry, wanted, progress)
        if (git := manager.found()) is None:
            raise
        failures = fetch_events(git, wanted.name)
        try:
            version = manager.resolve(reference)
        except VersionNotFoundError as error:
            if not failures:
                raise
            what = f"{error.what}, and it could not be fetched from {'; '.join(failures)}"
            raise VersionNotFoundError(what, f"{error.remedy}; look at git remote -v") from error
    try:
        _bring(manager, version, force=force)
    except StorageError:
        entry = catalogue.get(version.name)
        if entry is None or version.version not in entry.versions:
            raise
        _restore(manager, version, entry, progress)
    _materialise(manager, version)
    return version


def _register(
    manager: ModelVersionManager, entry: ModelEntry, wanted: Reference, progress: Progress | None
) -> ModelVersion:
    manager.ensure_home()
    model = _fetch(manager, entry, wanted, progress)
    stored = manager.store_weights(wanted.name, model.checkpoint)
    committed = _committed_pointer(manager.root, wanted.name)
    if committed and committed.md5 != stored[0].md5 and not _may_be_anothers(committed, manager, entry, wanted):
        raise IntegrityError(
            f"the weights from {model.weights.origin} are not those models/{wanted.name}.dvc points to "
            f"({stored[0].md5} against {committed.md5})",
            f"look at git log models/{wanted.name}.dvc, and restore the pointer or the source in conf/model",
        )
    if _adopt_remote_tag(Git(manager.root), wanted, model.checkpoint.model_digest, stored[0]):
        version = manager.get_version(wanted.name, wanted.selector)
    else:
        metadata = {"description": entry.description, "licence": entry.licence}
        reason = f"fetched from {model.weights.origin}"
        version = manager.register_version(model, wanted.selector, metadata, reason=reason, stored=stored)
    _materialise(manager, version)
    return version


def _fetch(manager: ModelVersionManager, entry: ModelEntry, wanted: Reference, progress: Progress | None) -> _Fetched:
    from proteus_pipeline.models.sources import FileSource, fetch

    source = entry.versions[wanted.selector]
    if isinstance(source, FileSource):
        source = FileSource(manager.root / source.path)  # relative to the project, wherever the user stands
    folder = manager.root / ".proteus" / "downloads" / wanted.name / wanted.selector
    return _Fetched(wanted.name, fetch(source, folder, progress))


def _bring(manager: ModelVersionManager, version: ModelVersion, *, force: bool) -> None:
    """Have the weights in the cache, from a backup or a DVC remote where they are missing or, with `force`, damaged."""
    if force:
        check_bytes(manager, version)
    else:
        supply(manager.root, version.pointer, version.reference)


def _restore(manager: ModelVersionManager, version: ModelVersion, entry: ModelEntry, progress: Progress | None) -> None:
    """Put the weights of a tagged version back into the cache, from its source, and only if they are the same."""
    model = _fetch(manager, entry, Reference.parse(version.reference), progress)
    found, known = model.checkpoint.model_digest, version.record.model_digest if version.record else None
    if known is not None and found != known:
        raise IntegrityError(
            f"{model.weights.origin} no longer gives the weights of {version.reference}: digest {found}, tagged {known}",
            "fetch them from a DVC remote or a colleague who has them",
        )
    pointer, _ = manager.store_weights(version.name, model.checkpoint)
    if pointer.md5 != version.pointer.md5:
        raise IntegrityError(
            f"{model.weights.origin} does not give the weights of {version.reference}: {pointer.md5}, "
            f"and the tag's pointer says {version.pointer.md5}",
            "fetch them from a DVC remote or a colleague who has them",
        )


def _adopt_remote_tag(git: Git, wanted: Reference, digest: str, pointer: Pointer) -> bool:
    """Take a remote's tag of this version where it is of the same weights: then every clone has the same tag.

    A remote that can't be reached is no error: tags are made offline too. Returns whether the tag is here now.
    """
    tag = str(wanted)
    for remote, oid in offered(git, tag):
        (found,) = git.read_objects([oid])
        message = found.data.decode("utf-8", "replace").partition("\n\n")[2] if found and found.kind == "tag" else ""
        record = read_record(message, tag)
        if record is None or (record.model_digest, record.weights["md5"]) != (digest, pointer.md5):
            raise VersionConflictError(
                f"{tag} on {remote} has other weights: {record.model_digest if record else 'no record'}, here {digest}",
                "fetch that tag, or register these weights as a new version",
            )
        # None when the tag is here by now: another process was faster, or the version was deleted.
        return publish(git, {tag: oid})
    return False


def _committed_pointer(root: Path, name: str) -> Pointer | None:
    text = Git(root).read("HEAD", f"models/{name}.dvc")
    return Pointer.parse(text, f"models/{name}.dvc") if text else None


def _may_be_anothers(committed: Pointer, manager: ModelVersionManager, entry: ModelEntry, wanted: Reference) -> bool:
    """Say whether HEAD's pointer is, or may yet turn out to be, that of another version than the wanted one.

    It may while a version of the catalogue is not registered: which one HEAD means is not written anywhere.
    """
    git, path = Git(manager.root), f"models/{wanted.name}.dvc"
    registered = {e.version: e.commit for e in manager.history(wanted.name).events if e.kind == "registered"}
    if entry.versions.keys() - registered.keys() - {wanted.selector}:
        return True
    return any(committed.md5 in (git.read(commit, path) or "") for commit in registered.values())


def _materialise(manager: ModelVersionManager, version: ModelVersion) -> None:
    """Write models/NAME/ when the working tree's own pointer asks for this version and the folder is not there."""
    path = manager.root / "models" / f"{version.name}.dvc"
    if path.is_file() and path.read_text(encoding="utf-8") == version.pointer.text():
        DvcCache(manager.root).checkout(version.pointer, path.with_suffix(""))
