"""Model versions: annotated git tags that point to DVC-tracked weights."""

from __future__ import annotations

import datetime
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from proteus_pipeline.errors import (
    IntegrityError,
    StorageError,
    VersionConflictError,
    VersionNotFoundError,
)
from proteus_pipeline.identity.names import Reference, Version, check_name
from proteus_pipeline.registry.artifacts import declare_artifact, declares_artifact
from proteus_pipeline.registry.events import Event, History, fold, greatest
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.home import DEFAULT_HOME, find_home, open_home
from proteus_pipeline.registry.records import VersionRecord, json_like
from proteus_pipeline.registry.tags import read_events
from proteus_pipeline.registry.weights import DvcCache, Pointer

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint


class RegistrableModel(Protocol):
    """What `ModelVersionManager.register_version` needs of a model: a name, and weights to read."""

    @property
    def name(self) -> str: ...

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def source(self) -> Mapping[str, Any]: ...


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

    """

    name: str
    version: str
    tag: str
    commit: str
    record: VersionRecord | None
    current: bool
    root: Path
    damage: IntegrityError | None = None

    @property
    def reference(self) -> str:
        return f"{self.name}@v{self.version}"

    @property
    def pointer(self) -> Pointer:
        """The DVC pointer at the tag's commit.

        Raises
        ------
        IntegrityError
            When there is none, or it is not the one that the record was made with.

        """
        if self.damage:
            raise self.damage
        path = f"models/{self.name}.dvc"
        text = Git(self.root).read(self.commit, path)
        if text is None:
            raise IntegrityError(f"{path} is not in the commit of tag {self.tag}", "fetch the tag again from a remote")
        pointer = Pointer.parse(text, f"{path} at {self.tag}")
        if self.record and self.record.weights["md5"] != pointer.md5:
            raise IntegrityError(f"{path} at {self.tag} is not the pointer in the tag's record", "fetch the tag again")
        return pointer

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The version's tensors, memory-mapped from the DVC cache, and checked against the record's digests.

        Raises
        ------
        StorageError
            When the weights are not in the cache.
        IntegrityError
            When a tensor is not what the record says.

        """
        from proteus_pipeline.models.reading import read_folder

        files = DvcCache(self.root).files(self.pointer)
        if files is None:
            raise StorageError(
                f"the weights of {self.reference} are not in the DVC cache",
                f"dvc fetch models/{self.name}.dvc at that tag, or: proteus model fetch {self.reference}",
            )
        remedy = f"proteus model fetch {self.reference} --force"
        try:
            checkpoint = read_folder(files, self.reference)
        except (ValueError, ArithmeticError, KeyError, TypeError) as error:
            if self.record is None:
                raise
            # They were read when the tag was made, so that it is their bytes that changed.
            raise IntegrityError(
                f"the weights of {self.reference} in the DVC cache are damaged ({error})", remedy
            ) from error
        if self.record and checkpoint.digests != dict(self.record.components):
            changed = [n for n, d in self.record.components.items() if checkpoint.digests.get(n) != d]
            raise IntegrityError(
                f"the weights of {self.reference} in the DVC cache are damaged ({', '.join(changed) or 'extra tensors'})",
                remedy,
            )
        return checkpoint


class ModelVersionManager:
    """The registry of one repository: a project's own, or a home of its own.

    Parameters
    ----------
    storage_path
        A folder in a git repository with DVC. When it does not exist, the first registration creates it, as a
        repository with a first commit.

    """

    def __init__(self, storage_path: str | Path = DEFAULT_HOME) -> None:
        self.root = Path(storage_path).expanduser().absolute()
        self._known: Git | None = None
        self._found()

    def _found(self) -> Git | None:
        """Return the repository, or None while nobody has created it."""
        if self._known is None and (found := find_home(self.root)):
            self._known, self.root = found, found.root
        return self._known

    def ensure_home(self) -> Git:
        """Return the repository, created when there is none; StorageError when it can't be."""
        self._known = self._found() or open_home(self.root)
        self.root = self._known.root
        return self._known

    def register_version(
        self,
        model: RegistrableModel,
        version: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        configuration: Mapping[str, Any] | None = None,
        dependencies: Sequence[str] = (),
        reason: str = "",
        breaking: str = "",
        stored: tuple[Pointer, dict[str, Any]] | None = None,
    ) -> ModelVersion:
        """Store a model's weights and tag them.

        The tag points to HEAD when HEAD holds the pointer to these weights already, else to a new commit that only the
        tag reaches; branch, index and working tree stay as they are. Registering the same weights under the same
        version again changes nothing.

        Parameters
        ----------
        model
            A name, and weights: ``ModelInterface(name, weights=PATH)``.
        version
            SemVer.
        metadata, configuration
            JSON-like values to keep in the record.
        dependencies
            References of versions this one builds on.
        reason, breaking
            Words for the history.
        stored
            What `store_weights` returned, where it has stored these weights already.

        Raises
        ------
        InvalidVersionError
            For a name or version that breaks the grammar.
        ConfigError
            When metadata or configuration is not JSON-like.
        VersionConflictError
            When the version exists with other weights, or other metadata where some is given.
        StorageError
            When the weights can't be read or stored.

        """
        name, number = check_name(model.name), Version.parse(version).text
        metadata = None if metadata is None else json_like(metadata, "metadata")
        given = {"source": dict(model.source), "metadata": metadata or {}, "reason": reason, "breaking": breaking}
        given["configuration"] = json_like(configuration or {}, "configuration")
        given["dependencies"] = tuple(str(Reference.parse(d)) for d in dependencies)
        history, checkpoint = self.history(name), model.checkpoint
        if any(e.version == number for e in history.events):
            return self._same_or_conflict(name, number, checkpoint, metadata)
        pointer, weights = stored or self.store_weights(name, checkpoint)
        record = self._record(history, number, checkpoint, weights, given)
        commit = self._commit_with(pointer, record)
        if not self.ensure_home().create_tag(f"{name}@v{number}", commit, record.message()):
            return self._same_or_conflict(name, number, checkpoint, metadata)
        return self.get_version(name, number)

    def _record(
        self, history: History, number: str, checkpoint: Checkpoint, weights: dict[str, Any], given: dict[str, Any]
    ) -> VersionRecord:
        who = self.ensure_home().identity()
        # A damaged record's number is not known: one is left free for each.
        last = max((e.sequence or 0 for e in history.events), default=0) + sum(1 for e in history.events if e.damage)
        return VersionRecord(
            name=history.name,
            version=number,
            sequence=1 + last,
            model_digest=checkpoint.model_digest,
            components=checkpoint.digests,
            architecture=checkpoint.architecture.identity(),
            weights=weights,
            parent=history.current,
            author={"name": who.name, "email": who.email, "fallback": who.fallback},
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **given,
        )

    def get_version(self, model_name: str, version: str) -> ModelVersion:
        """Return one live version; its weights are mapped when first asked for.

        Raises
        ------
        InvalidVersionError
            For a name or version that breaks the grammar.
        VersionNotFoundError
            When there is no such version, with those there are.
        IntegrityError
            When its record is damaged, or of a later schema.

        """
        history = self.history(check_name(model_name))
        number = Version.parse(version).text
        if number not in history.live:
            raise self._not_found(history, f"v{number}")
        return self._sound(history, number)

    def list_versions(self, model_name: str) -> list[ModelVersion]:
        """Return a model's live versions in SemVer order, also those with `damage`; none is an empty list."""
        history = self.history(check_name(model_name))
        return [self._version(history, number) for number in history.live]

    def list_models(self) -> dict[str, list[ModelVersion]]:
        """Return every model's live versions, by name."""
        by_name: dict[str, list[Event]] = {}
        for event in self._events():
            by_name.setdefault(event.name, []).append(event)
        histories = [fold(name, events) for name, events in sorted(by_name.items())]
        return {h.name: [self._version(h, number) for number in h.live] for h in histories if h.live}

    def resolve(self, reference: str) -> ModelVersion:
        """Return the version a reference means now.

        Raises
        ------
        InvalidVersionError
            When the reference breaks the grammar.
        VersionNotFoundError
            When nothing fits it.
        IntegrityError
            When the record of the version it means is damaged; no other version stands in for it.

        """
        wanted = Reference.parse(reference)
        history = self.history(wanted.name)
        fitting = [v for v in history.live if wanted.selects(Version(v))]
        number = history.current if wanted.selector == "current" else greatest(fitting)
        if number is None:
            raise self._not_found(history, wanted.selector)
        return self._sound(history, number)

    def history(self, name: str) -> History:
        """Return a model's events in order, and what they come to."""
        return fold(name, self._events(name))

    def _events(self, name: str | None = None) -> list[Event]:
        git = self._found()
        return read_events(git, name) if git else []

    def _version(self, history: History, number: str) -> ModelVersion:
        event = history.live[number]
        current = number == history.current
        return ModelVersion(
            history.name, number, event.tag, event.commit, event.record, current, self.root, event.damage
        )

    def _sound(self, history: History, number: str) -> ModelVersion:
        version = self._version(history, number)
        if version.damage:
            raise version.damage
        return version

    def _not_found(self, history: History, wanted: str) -> VersionNotFoundError:
        if not history.live:
            known = ", ".join(self.list_models()) or "none"
            return VersionNotFoundError(
                f"no model {history.name} is registered in {self.root}",
                f"registered there: {known}; see proteus model list",
            )
        return VersionNotFoundError(
            f"{history.name} has no version {wanted} in {self.root}",
            f"it has {', '.join(f'v{v}' for v in history.live)}",
        )

    def _same_or_conflict(
        self, name: str, number: str, checkpoint: Checkpoint, metadata: Mapping[str, Any] | None
    ) -> ModelVersion:
        history = self.history(name)
        if not any(e.version == number for e in history.events):
            raise StorageError(f"git could not lock the tag {name}@v{number}", "run the command again")
        if number not in history.live:
            raise VersionConflictError(
                f"{name}@v{number} was deleted, and a version number is never used again", "register the next version"
            )
        there = self._sound(history, number)
        digest = there.record.model_digest if there.record else there.checkpoint.model_digest
        if digest != checkpoint.model_digest:
            raise VersionConflictError(
                f"{there.reference} exists with other weights: registered {digest}, given {checkpoint.model_digest}",
                "register these as a new version",
            )
        known = dict(there.record.metadata) if there.record else {}
        if metadata is not None and dict(metadata) != known:
            raise VersionConflictError(
                f"{there.reference} exists with other metadata: registered {known}, given {dict(metadata)}",
                "leave the metadata out, or register a new version",
            )
        return there

    def store_weights(self, name: str, checkpoint: Checkpoint) -> tuple[Pointer, dict[str, Any]]:
        """Put the canonical folder into the DVC cache; return its pointer, and what a record says of it."""
        from proteus_pipeline.models.folder import write_folder

        scratch = self.ensure_home().root / ".proteus"
        try:
            scratch.mkdir(exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="register-", dir=scratch))
        except OSError as error:
            raise StorageError(
                f"{scratch} can't be written ({error.strerror})", "check its permissions and space"
            ) from error
        try:
            write_folder(checkpoint, folder)
            stored = DvcCache(self.root).add_folder(folder, name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        p = stored.pointer
        return p, {"md5": p.md5, "sha256": stored.sha256, "size": p.size, "files": p.files}

    def _commit_with(self, pointer: Pointer, record: VersionRecord) -> str:
        """Return the commit to tag: HEAD where it has the pointer already and no version of this model, or a child."""
        git = self.ensure_home()
        head = git.head()
        path = f"models/{record.name}.dvc"
        dvc_yaml = (git.read(head, "dvc.yaml") if head else None) or ""
        has_pointer = head is not None and git.read(head, path) == pointer.text()
        tagged = any(e.commit == head for e in self.history(record.name).events)
        if head and has_pointer and not tagged and declares_artifact(dvc_yaml, record.name):
            return head
        # As dvc add does, so that git status stays clean after a checkout of the tag and of the weights.
        ignored, line = str(PurePosixPath(path).with_name(".gitignore")), f"/{PurePosixPath(record.name).name}\n"
        ignores = (git.read(head, ignored) if head else None) or ""
        files = {path: pointer.text(), "dvc.yaml": declare_artifact(dvc_yaml, record.name)}
        if line not in ignores.splitlines(keepends=True):
            files[ignored] = ignores + line
        return git.commit_files(
            files, f"{record.name} {record.version}\n\nRegistered by proteus; only its tag leads here.\n"
        )
