"""Deleting versions, bringing them back, making one current again: a plan that says what it would do, then its execution.

The order makes every step repeatable after a crash: the backup is made and read back, then the event is published, and
only then are bytes dropped; on the way back the bytes are there and checked before the version is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from proteus_pipeline.errors import IntegrityError, StorageError, VersionConflictError
from proteus_pipeline.registry.backups import Backup, Backups
from proteus_pipeline.registry.events import History
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.protection import pointed_to, users
from proteus_pipeline.registry.publishing import publish_event
from proteus_pipeline.registry.records import read_record
from proteus_pipeline.registry.refs import exclusive, publish
from proteus_pipeline.registry.supply import mend, supply
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.weights import DvcCache

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint
    from proteus_pipeline.registry.versions import ModelVersionManager


@dataclass(frozen=True)
class Deletion:
    """What deleting one version comes to.

    Attributes
    ----------
    reference
        The version.
    needed
        Why it is refused: what still needs the version. Empty when nothing does.
    backup
        Whether a backup is made first.
    drops
        The MD5s of the objects that leave the DVC cache; those that another version, a branch or another tag needs stay.
    frees
        Their bytes.
    done
        Whether the version is deleted already, and only bytes are left to drop.

    """

    reference: str
    needed: tuple[str, ...]
    backup: bool
    drops: tuple[str, ...]
    frees: int
    done: bool = False


def plan(manager: ModelVersionManager, history: History, numbers: Sequence[str]) -> list[Deletion]:
    """Return what deleting some versions of a model would do; nothing is changed.

    Raises
    ------
    VersionNotFoundError
        When one was never registered.
    IntegrityError
        When the record or pointer of one is damaged.

    """
    versions = [manager.version_of(history, number) for number in numbers]
    git = manager.ensure_home()
    live = [v for found in manager.list_models().values() for v in found]
    needed = users(git, history, [v for v in versions if v.version in history.live], live)
    cache, backups = DvcCache(manager.root), Backups(manager.root)
    staying = [v for v in live if v.reference not in {gone.reference for gone in versions}]
    # Where nobody can say what a live version has, nothing is dropped.
    may_drop = cache.is_own and all(_is_listed(cache, v) for v in staying)
    kept = _objects(cache, staying) | _expanded(cache, pointed_to(git)) if may_drop else None
    deletions = []
    for version in versions:
        done = version.version not in history.live
        drops: list[str] = []
        # Without a verified backup, only a deletion that nobody asked to back up drops bytes.
        if kept is not None and (not done or not manager.backup_enabled or backups.is_verified(version.reference)):
            drops = sorted(m for m in _objects(cache, [version]) - kept if cache.object(m).exists())
            kept |= set(drops)  # counted once
            drops.sort(key=lambda md5: md5.endswith(".dir"))  # what lists the others goes last, if the process dies
        frees = sum(cache.object(md5).stat().st_size for md5 in drops)
        why = () if done else tuple(needed[version.reference])
        deletions.append(Deletion(version.reference, why, manager.backup_enabled, tuple(drops), frees, done))
    return deletions


def delete(
    manager: ModelVersionManager, name: str, number: str, *, reason: str = "", force: bool = False, keep: bool = False
) -> Deletion:
    """Delete one version: backup, event, bytes; repeating it after an interruption completes it.

    Parameters
    ----------
    force
        Also where something needs the version.
    keep
        Whether bytes stay in the cache where no backup is made.

    Raises
    ------
    VersionConflictError
        When something needs the version: with the list.
    VersionNotFoundError
        When it was never registered.
    IntegrityError, StorageError
        When a backup can't be made; nothing is deleted then.

    """
    git = manager.ensure_home()
    _refuse_needed(manager, name, number, force=force)
    backed_up = manager.backup_enabled and _has_weights(manager.version_of(manager.history(name), number))
    if backed_up and number in manager.history(name).live:
        # Outside the lock: gigabytes may be copied.
        back_up(manager, manager.version_of(manager.history(name), number))
    with exclusive(git):
        history = manager.history(name)
        deletion = _refuse_needed(manager, name, number, force=force)
        if not deletion.done:
            if backed_up and not Backups(manager.root).is_there(deletion.reference):
                # Its objects went with a backup that was released meanwhile.
                back_up(manager, manager.version_of(history, number))
            details = {"backup": backed_up, "forced": list(deletion.needed)}
            publish_event(git, history, "deleted", history.known[number], reason=reason, details=details)
        if manager.backup_enabled or not keep:
            for md5 in deletion.drops:
                DvcCache(manager.root).remove(md5)
    return deletion


def _refuse_needed(manager: ModelVersionManager, name: str, number: str, *, force: bool) -> Deletion:
    (deletion,) = plan(manager, manager.history(name), [number])
    if deletion.needed and not force:
        raise VersionConflictError(
            f"{deletion.reference} can't be deleted: {'; '.join(deletion.needed)}",
            "roll back, or let go of it there first; --force deletes it all the same",
        )
    return deletion


def back_up(manager: ModelVersionManager, version: ModelVersion) -> None:
    """Make a version's backup, unless a verified one is there.

    Raises
    ------
    IntegrityError
        When an object of it is damaged.
    StorageError
        When its weights are nowhere, or the backup can't be written.

    """
    backups, cache = Backups(manager.root), DvcCache(manager.root)
    if backups.is_verified(version.reference):
        return
    supply(manager.root, version.pointer, version.reference)
    entries = cache.listing(version.pointer) or {}
    folder = [version.pointer.md5] if version.pointer.is_folder else []
    objects = tuple(dict.fromkeys([*folder, *entries.values()]))
    (tag,) = Git(manager.root).read_objects([version.oid])
    text = tag.data.decode("utf-8", "surrogateescape") if tag and tag.kind == "tag" else ""
    backups.make(Backup(version.reference, version.tag, text, version.pointer, objects), cache)


def restore(manager: ModelVersionManager, name: str, number: str, *, reason: str = "") -> ModelVersion:
    """Bring a deleted version back: its bytes first, checked against its record, then the event.

    Raises
    ------
    VersionNotFoundError
        When it was never registered.
    StorageError
        When its weights are neither in the cache, nor in its backup or a remote.
    IntegrityError
        When they are not what the record says.

    """
    git = manager.ensure_home()
    if number not in manager.history(name).known:
        _restore_tag(manager, git, f"{name}@v{number}")
    version = manager.version_of(manager.history(name), number)
    check_bytes(manager, version)
    with exclusive(git):
        history = manager.history(name)
        if number not in history.live:
            supply(manager.root, version.pointer, version.reference)  # what it shares may have been dropped meanwhile
            publish_event(git, history, "restored", history.known[number], reason=reason)
        Backups(manager.root).release(version.reference)
    return manager.get_version(name, number)


def make_current(manager: ModelVersionManager, name: str, number: str, *, reason: str) -> ModelVersion:
    """Make a version current: its bytes first, checked against its record, then the event.

    Raises
    ------
    VersionNotFoundError
        When there is no such version, or it was deleted.
    StorageError, IntegrityError
        As `check_bytes`; what was current stays so.

    """
    git, target = manager.ensure_home(), manager.get_version(name, number)
    check_bytes(manager, target)
    with exclusive(git):
        history = manager.history(target.name)
        if target.version not in history.live:
            raise manager.not_found(history, f"v{target.version}")
        if history.current != target.version:
            publish_event(git, history, "made current", history.known[target.version], reason=reason)
    return manager.get_version(target.name, target.version)


def _restore_tag(manager: ModelVersionManager, git: Git, reference: str) -> None:
    """Write a version's tag again from its backup, where git has lost it and has the commit it points to."""
    backup = Backups(manager.root).find(reference)
    if backup is None or not backup.tag_object:
        return
    head, _, message = backup.tag_object.partition("\n\n")
    said = dict(line.partition(" ")[::2] for line in head.split("\n"))
    # A file that anybody may have edited: it names one tag, of one commit, with that version's record.
    if not (backup.reference == backup.tag == said.get("tag") == reference and read_record(message, reference)):
        raise IntegrityError(
            f"the backup of {reference} holds another version's tag", "restore it from a copy of the folder"
        )
    commit = said.get("object", "")
    if commit.isalnum() and git.ids([f"{commit}^{{commit}}"]) != [None]:
        text = backup.tag_object.encode("utf-8", "surrogateescape")
        oid = git.run_bytes("hash-object", "-t", "tag", "-w", "--stdin", data=text).decode().strip()
        publish(git, {backup.tag: oid})


def check_bytes(manager: ModelVersionManager, version: ModelVersion) -> None:
    """Make sure that a version's weights are here, whole and what its record says; damaged ones are mended.

    Raises
    ------
    StorageError
        When they are nowhere.
    IntegrityError
        When they are not what the record says, and no sound copy is found.

    """
    try:
        if version.record:
            touch(version.checkpoint)
            return
    except IntegrityError:
        pass  # by its digests; which object it is, the hashes say
    cache = DvcCache(manager.root)
    if version.pointer.is_folder and not cache.is_sound(version.pointer.md5):
        mend(manager.root, [version.pointer.md5], version.reference)
    entries = cache.listing(version.pointer) or {}
    if damaged := [md5 for md5 in entries.values() if not cache.is_sound(md5)]:
        mend(manager.root, damaged, version.reference)
    touch(replace(version).checkpoint)  # anew: what was mapped before was damaged


def touch(checkpoint: Checkpoint) -> None:
    """Have every tensor checked: each is when it is touched."""
    for name in checkpoint.tensors:
        checkpoint.tensors[name]


def retire(
    manager: ModelVersionManager, name: str, keep: int, *, reason: str, new: str | None = None
) -> list[Deletion]:
    """Delete the oldest versions that nothing needs until `keep` are left; a version just made stays.

    Raises
    ------
    StorageError
        When a backup can't be made; what was deleted until then stays so.

    """
    deletions = []
    for planned in plan_retirement(manager, name, keep, new=new):
        number = planned.reference.rpartition("@v")[2]
        deletions.append(delete(manager, name, number, reason=reason, keep=True))
    return deletions


def plan_retirement(manager: ModelVersionManager, name: str, keep: int, *, new: str | None = None) -> list[Deletion]:
    """Return what `retire` would delete, the oldest registration first."""
    history = manager.history(name)
    too_many = len(history.live) - keep
    if too_many <= 0:
        return []
    order = [e.version for e in history.events if e.kind in {"registered", "restored"} and e.version in history.live]
    oldest = [number for number in dict.fromkeys(order) if number and number != new]
    sound = [number for number in oldest if not manager.version_of(history, number, damaged=True).damage]
    chosen = [d.reference.rpartition("@v")[2] for d in plan(manager, history, sound) if not d.needed][:too_many]
    return plan(manager, history, chosen)


def _has_weights(version: ModelVersion) -> bool:
    """Say whether a version points to weights; a tag that somebody made for another purpose need not."""
    if version.record:
        return True
    try:
        return bool(version.pointer.md5)
    except IntegrityError:
        return False


def _is_listed(cache: DvcCache, version: ModelVersion) -> bool:
    """Say whether what a version's weights consist of can be read here, or is known to be nothing."""
    if version.damage or not _has_weights(version):
        return not version.damage
    md5 = str(version.record.weights["md5"]) if version.record else version.pointer.md5
    try:
        return cache.listing(Pointer(md5, 0, 0, "folder")) is not None
    except (IntegrityError, StorageError):
        return False


def _objects(cache: DvcCache, versions: Iterable[ModelVersion]) -> set[str]:
    """Return the MD5s of some versions' objects, as far as their directory objects are here."""
    sound = [v for v in versions if not v.damage and _has_weights(v)]
    return _expanded(cache, {str(v.record.weights["md5"]) if v.record else v.pointer.md5 for v in sound})


def _expanded(cache: DvcCache, md5s: Iterable[str]) -> set[str]:
    """Return some MD5s, and those that the directory objects among them list."""
    found = set()
    for md5 in md5s:
        found.add(md5)
        if md5.endswith(".dir"):
            try:
                found.update((cache.listing(Pointer(md5, 0, 0, "folder")) or {}).values())
            except (IntegrityError, StorageError):
                continue  # a damaged listing protects nothing, and its own version's check names it
    return found
