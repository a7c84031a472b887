"""A version's record, its commit and its tag, and the branch that may go along."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import StorageError
from proteus_pipeline.identity.names import Version
from proteus_pipeline.registry.artifacts import declare_artifact, declares_artifact
from proteus_pipeline.registry.events import History
from proteus_pipeline.registry.git import TEMPORARY_INDEX, Git
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.publishing import author, now_text, tag_time
from proteus_pipeline.registry.records import VersionRecord
from proteus_pipeline.registry.refs import exclusive, publish
from proteus_pipeline.stores.files import storage_error

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Branch:
    """A branch that a registration advances: its full ref, and its commit before."""

    ref: str
    commit: str | None


@dataclass(frozen=True)
class Registration:
    """What is to be registered, checked and stored.

    Attributes
    ----------
    name, checkpoint, pointer
        The model, its tensors, and where they lie in the DVC cache.
    weights
        What a record says of them.
    given
        The record's fields that the caller gave.
    branch
        The branch to advance, or None.

    """

    name: str
    checkpoint: Checkpoint
    pointer: Pointer
    weights: Mapping[str, Any]
    given: Mapping[str, Any] = field(default_factory=dict)
    branch: Branch | None = None

    def record(self, git: Git, history: History, number: str) -> VersionRecord:
        """Return the version's record."""
        return VersionRecord(
            name=self.name,
            version=number,
            sequence=history.next_sequence,
            model_digest=self.checkpoint.model_digest,
            components=self.checkpoint.digests,
            architecture=self.checkpoint.architecture.identity(),
            weights=self.weights,
            parent=history.current,
            author=author(git),
            time=now_text(),
            **self.given,
        )

    def tag(self, git: Git, history: History, number: str) -> bool:
        """Publish the tag, and the branch's new commit with it; False where the tag exists. Within `exclusive`."""
        record = self.record(git, history, number)
        _warn_of_breaks(history, record)
        head = git.head()
        files = self._files(git, head, record)
        tagged = any(e.commit == head for e in history.events)
        commit = head if head and not files and not tagged else None
        if commit is None:
            message = f"{self.name} {number}\n\nRegistered by proteus; only its tag leads here.\n"
            if self.branch:
                message = f"{self.name} {number}\n\nRegistered by proteus.\n"
            commit = git.commit_files(files, message, head)
        advances = self.branch if self.branch and commit != head else None
        tag = f"{self.name}@v{number}"
        oid = git.make_tag(tag, commit, record.message(), tag_time(history, "registered", number))
        if not advances:
            return publish(git, {tag: oid})
        clean_branch(git, self.name)  # storing weights takes minutes, in which somebody may have edited
        with _brought_along(git, files) as bring:
            made = publish(git, {tag: oid}, (advances.ref, commit, advances.commit))
            if made:
                bring()
        return made

    def _files(self, git: Git, head: str | None, record: VersionRecord) -> dict[str, str]:
        """Return the files that a commit of this version has, and HEAD has not."""
        path = f"models/{record.name}.dvc"
        # As dvc add does, so that git status stays clean after a checkout of the tag and of the weights.
        ignored, line = str(PurePosixPath(path).with_name(".gitignore")), f"/{PurePosixPath(record.name).name}\n"
        names = (path, "dvc.yaml", ignored)
        found = git.read_objects([f"{head}:{name}" for name in names]) if head else [None] * len(names)
        there = {name: blob.data.decode("utf-8", "replace") for name, blob in zip(names, found, strict=True) if blob}
        files: dict[str, str] = {}
        if there.get(path) != self.pointer.text():
            files[path] = self.pointer.text()
        if not declares_artifact(there.get("dvc.yaml", ""), record.name):
            files["dvc.yaml"] = declare_artifact(there.get("dvc.yaml", ""), record.name)
        ignores = there.get(ignored, "")
        # A pointer that is committed already has its line in one .gitignore or another.
        if files and line not in ignores.splitlines(keepends=True):
            files[ignored] = ignores + line
        return files


def clean_branch(git: Git, name: str) -> Branch:
    """Return the branch that a registration may advance.

    Raises
    ------
    StorageError
        When no branch is checked out, or the files that its commit changes are changed here already.

    """
    ref = git.try_run("symbolic-ref", "--quiet", "HEAD")
    if ref is None:
        raise StorageError(f"no branch is checked out in {git.root}", "git switch to one, or leave --on-branch out")
    paths = touched(name)
    # Without git's refreshing its index meanwhile: a kill would leave the index locked.
    unlocked = {"GIT_OPTIONAL_LOCKS": "0"}
    changed = git.run("status", "--porcelain", "--untracked-files=all", "--", *paths, env=unlocked)
    if changed:
        raise StorageError(
            f"{changed.split(maxsplit=1)[1].splitlines()[0]} has changes that are not committed",
            "commit or stash them first, or leave --on-branch out",
        )
    return Branch(ref, git.head())


def touched(name: str) -> tuple[str, str, str]:
    """Return the files that a registration's commit may change."""
    path = PurePosixPath("models", f"{name}.dvc")
    return str(path), "dvc.yaml", str(path.with_name(".gitignore"))


@contextmanager
def _brought_along(git: Git, files: Mapping[str, str]) -> Iterator[Callable[[], None]]:
    """Keep git's index locked, and yield what puts files into the working tree and the index, which are clean there.

    All that can fail beforehand does: the body publishes. Within `exclusive`, which clears away what a killed process
    left here: temporary files beside the index, and the lock, which is a second name of one of them.

    Raises
    ------
    StorageError
        When another git has the index locked, or something can't be written.

    """
    index = Path(git.run("rev-parse", "--path-format=absolute", "--git-path", "index"))
    lock = index.with_name("index.lock")
    held, staged = (git.folder() / f"{TEMPORARY_INDEX}{secrets.token_hex(8)}" for _ in range(2))
    try:
        held.touch()
        lock.hardlink_to(held)
    except FileExistsError as error:
        held.unlink()
        raise StorageError(
            f"another git works in {git.root}: {lock} is there",
            "wait for it to end; if there is none, remove that file",
        ) from error
    except OSError as error:
        held.unlink(missing_ok=True)
        raise storage_error("write", lock, error) from error
    placed: dict[Path, Path] = {}
    try:
        if index.exists():
            shutil.copyfile(index, staged)
        git.stage_files(files, env={"GIT_INDEX_FILE": str(staged)})
        for path, text in files.items():
            placed[git.root / path] = staged.with_name(f"{TEMPORARY_INDEX}{secrets.token_hex(8)}")
            placed[git.root / path].write_text(text, encoding="utf-8", newline="")

        def bring() -> None:
            for path, new in placed.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(new, path)  # a rename, but for a worktree on another disk
            staged.replace(index)

        yield bring
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error("write", git.root, error) from error
    finally:
        lock.unlink(missing_ok=True)
        for temporary in (held, staged, *placed.values()):
            temporary.unlink(missing_ok=True)


def follow(git: Git, tag_commit: str, name: str) -> None:
    """Complete a registration on a branch that was interrupted: branch, index and working tree.

    Raises
    ------
    StorageError
        When the branch has gone elsewhere since.

    """
    ref = git.try_run("symbolic-ref", "--quiet", "HEAD")
    if ref is None:
        raise StorageError(f"no branch is checked out in {git.root}", "git switch to one, or leave --on-branch out")
    with exclusive(git):
        head = git.head()
        advances = head == git.try_run("rev-parse", "--verify", "--quiet", f"{tag_commit}^")
        if advances:
            clean_branch(git, name)
        elif head != tag_commit:
            if git.try_run("merge-base", "--is-ancestor", tag_commit, "HEAD") is None:
                raise StorageError(
                    f"{ref.removeprefix('refs/heads/')} has moved on since the tag was made",
                    f"git merge {tag_commit[:12]}",
                )
            return
        paths = touched(name)
        now = git.read_objects([f"{tag_commit}:{path}" for path in paths])
        before = git.read_objects([f"{tag_commit}^:{path}" for path in paths])
        staged = git.read_objects([f":{path}" for path in paths])
        behind = {
            path: new.data.decode()
            for path, new, old, index in zip(paths, now, before, staged, strict=True)
            # The working tree is written before the index.
            if new and new != old and index == old and _on_disk(git, path) in {old.data if old else None, new.data}
        }
        if behind or advances:
            with _brought_along(git, behind) as bring:
                if advances:
                    publish(git, {}, (ref, tag_commit, head))
                bring()


def _on_disk(git: Git, path: str) -> bytes | None:
    try:
        return (git.root / path).read_bytes()
    except FileNotFoundError:
        return None


def _warn_of_breaks(history: History, record: VersionRecord) -> None:
    """Warn of a MAJOR step that does not say what it breaks, and of a break that is no MAJOR step."""
    before = history.predecessor(record.version)
    if before is None:
        return
    reference = f"{record.name}@v{record.version}"
    if Version(record.version).semver.major > Version(before).semver.major:
        if not record.breaking:
            _log.warning(
                "%s is a MAJOR version and does not say what it breaks; next time give --breaking TEXT", reference
            )
        return
    old = history.known[before].record
    broken = [k for k in ("width", "layers", "tokens") if old and old.architecture.get(k) != _plain(record, k)]
    if broken:
        _log.warning("%s differs from v%s in %s, which asks for a MAJOR version", reference, before, ", ".join(broken))


def _plain(record: VersionRecord, key: str) -> Any:
    """Return a value of the architecture as it comes back from a record."""
    value = record.architecture[key]
    return list(value) if isinstance(value, tuple) else value
