"""Whether everything that the registry says still holds: tags, records, pointers, objects, digests, remotes, backups."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from shlex import quote
from typing import TYPE_CHECKING

from proteus_pipeline.errors import ConfigError, IntegrityError, ModelError, ProteusError, StorageError
from proteus_pipeline.registry.backups import Backups
from proteus_pipeline.registry.events import Event, History, parse_tag
from proteus_pipeline.registry.fetching import offered
from proteus_pipeline.registry.home import private_folder, scratch_folder
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.records import read_event, read_record
from proteus_pipeline.registry.refs import put_back, read_ledger
from proteus_pipeline.registry.remotes import DvcRemote, remotes
from proteus_pipeline.registry.retirement import touch
from proteus_pipeline.registry.supply import mend
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.weights import DvcCache, quarantine, sha256_of
from proteus_pipeline.stores.files import md5_file, write_atomic

if TYPE_CHECKING:
    from proteus_pipeline.registry.versions import ModelVersionManager

MISSING, DAMAGED = "missing", "damaged"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes
    ----------
    about
        The version or tag.
    part
        ``tag``, ``record``, ``pointer``, ``weights``, ``remote``, ``backup``, ``dependencies`` or ``lock``.
    kind
        ``missing``: it can be had again, or was never here. ``damaged``: it is not what it was.
    what, remedy
        As in an error.
    repaired
        What was done about it; None where nothing was.

    """

    about: str
    part: str
    kind: str
    what: str
    remedy: str
    repaired: str | None = None

    @property
    def exit_code(self) -> int:
        """0 once repaired, 3 for what is missing, 4 for what is damaged."""
        return 0 if self.repaired else 3 if self.kind == MISSING else 4


class Verification:
    """One pass over a registry, or over one version of it.

    Parameters
    ----------
    manager
        The registry.
    reference
        A version, or None for all.
    repair
        Whether to mend what can be mended: refetch, put back, and move what is damaged to quarantine. Nothing is deleted.
    deep
        Whether copies on remotes are read and hashed, not only asked for their size.

    """

    def __init__(
        self, manager: ModelVersionManager, reference: str | None = None, *, repair: bool = False, deep: bool = False
    ) -> None:
        self._manager = manager
        self._git = manager.ensure_home()
        self._cache = DvcCache(manager.root)
        self._repair = repair
        self._deep = deep
        self._name, _, number = (reference or "").partition("@v")
        self._tag = f"{self._name}@v{number}" if number else None

    def findings(self) -> Iterator[Finding]:
        """Yield what is wrong as it is found."""
        yield from self._tags()
        # Read after the tags were mended.
        histories = self._manager.histories(self._name or None)
        for history in histories:
            for number, event in history.live.items():
                if self._tag in {None, f"{history.name}@v{number}"} and not event.damage:
                    yield from self._version(self._manager.version_of(history, number))
        yield from self._backups()
        if self._tag is None:
            yield from self._dependencies(histories)
            yield from self._lock()

    def _tags(self) -> Iterator[Finding]:
        ledger = read_ledger(self._git)
        events = {e.tag: e for history in self._manager.histories(None) for e in history.events}
        # A deletion that was restored since, perhaps in another clone, goes by another name.
        renamed = {e.oid for e in events.values() if "%" in e.tag}
        for tag in sorted(ledger.keys() | events.keys()):
            parsed = parse_tag(tag)
            if parsed is None or not self._concerns(tag, parsed[1]):
                continue
            event, entered = events.get(tag), ledger.get(tag)
            if event is None and "!" in tag and entered in renamed:
                continue
            if event is None or (entered and event.oid != entered):
                yield self._meddled(tag, event, entered or "")
            elif event.damage:
                yield self._unreadable(tag, event)

    def _concerns(self, tag: str, name: str) -> bool:
        if self._tag:
            return tag == self._tag or tag.startswith((f"{self._tag}!", f"{self._tag}#", f"{self._tag}%"))
        return not self._name or name == self._name

    def _meddled(self, tag: str, event: Event | None, entered: str) -> Finding:
        kind, what = DAMAGED, f"tag {tag} was moved or edited"
        if event is None:
            kind, what = MISSING, f"tag {tag} was removed"
        else:
            what += f": it is {event.oid[:12]} now, and was {entered[:12]} when it was made"
        finding = Finding(tag, "tag", kind, what, f"git update-ref {quote(f'refs/tags/{tag}')} {entered}")
        if not self._readable(entered, tag):
            return replace(finding, remedy="fetch the tag again from a remote")

        def mend_tag() -> str:
            if event:
                # What it was moved to stays reachable: it may be somebody's work.
                kept = f"refs/proteus/quarantine/{tag}-{secrets.token_hex(4)}"
                self._git.run("update-ref", kept, event.oid)
            put_back(self._git, tag, entered)
            return f"put back to {entered[:12]}"

        return self._mended(finding, mend_tag)

    def _unreadable(self, tag: str, event: Event) -> Finding:
        assert event.damage  # noqa: S101 - the caller looked
        finding = Finding(tag, "record", DAMAGED, event.damage.what, "fetch the tag again from a remote")
        return self._mended(finding, lambda: self._fetch_tag(tag))

    def _fetch_tag(self, tag: str) -> str:
        """Take a tag from the first git remote that has it whole."""
        for remote, oid in offered(self._git, tag):
            if self._readable(oid, tag):
                put_back(self._git, tag, oid)
                return f"fetched from {remote}"
        raise StorageError(f"no git remote has {tag} whole", "ask a colleague who has it")

    def _readable(self, oid: str, tag: str) -> bool:
        (found,) = self._git.read_objects([oid])
        if found is None or found.kind != "tag":
            return found is not None and found.kind == "commit"  # a lightweight tag, as gto's users may have
        message = found.data.decode("utf-8", "replace").partition("\n\n")[2]
        try:
            read_record(message, tag)
            read_event(message, tag)
        except IntegrityError:
            return False
        return True

    def _version(self, version: ModelVersion) -> Iterator[Finding]:
        try:
            pointer = version.pointer
        except IntegrityError as error:
            finding = self._mended(
                Finding(version.reference, "pointer", DAMAGED, error.what, error.remedy),
                lambda: self._write_pointer(version),
            )
            yield finding
            if not finding.repaired:
                return
            pointer = self._manager.get_version(version.name, version.version).pointer
        yield from self._working_tree(version, pointer)
        wrong = list(self._objects(version, pointer))
        yield from wrong
        if all(f.repaired for f in wrong):
            yield from self._digests(version)
        yield from self._remotes(version, pointer)

    def _write_pointer(self, version: ModelVersion) -> str:
        """Write the pointer's blob again, which the commit names: its text follows from the record."""
        if version.record is None:
            raise StorageError("the tag has no record to write it from", "fetch the tag again from a remote")
        w = version.record.weights
        text = Pointer(w["md5"], int(w["size"]), int(w["files"]), version.name.rpartition("/")[2]).text()
        self._git.run("hash-object", "-w", "--stdin", data=text)
        found = self._manager.get_version(version.name, version.version)
        return f"written again: {found.pointer.md5}"

    def _working_tree(self, version: ModelVersion, pointer: Pointer) -> Iterator[Finding]:
        path = f"models/{version.name}.dvc"
        text = self._git.read("HEAD", path)
        if text is None or (self._git.root / path).exists() or text != pointer.text():
            return
        finding = Finding(
            version.reference,
            "pointer",
            MISSING,
            f"{path} is in HEAD, and not in the working tree",
            f"git restore {path}",
        )
        staged = self._git.read_objects([f":{path}"])[0]
        if staged is None:
            return  # removed in the index too: somebody means it

        def write() -> str:
            write_atomic(self._git.root / path, text.encode())
            return "written again"

        yield self._mended(finding, write)

    def _objects(self, version: ModelVersion, pointer: Pointer) -> Iterator[Finding]:
        if pointer.is_folder and not self._cache.is_sound(pointer.md5):
            finding = self._object_finding(version, pointer.md5, "the list of its files")
            yield finding
            if not finding.repaired:
                return
        try:
            listing = self._cache.listing(pointer) or {}
        except IntegrityError as error:
            yield Finding(version.reference, "weights", DAMAGED, error.what, error.remedy)
            return
        for name, md5 in listing.items():
            if not self._cache.is_sound(md5):
                yield self._object_finding(version, md5, name)

    def _object_finding(self, version: ModelVersion, md5: str, name: str) -> Finding:
        path = self._cache.object(md5)
        kind = DAMAGED if path.exists() else MISSING
        what = f"{name} of {version.reference} is {kind} in the DVC cache ({path})"

        def bring() -> str:
            try:
                mend(self._manager.root, [md5], version.reference)
            except StorageError:
                # So that DVC, which trusts what is read-only, does not hand it out either.
                quarantine(self._manager.root, self._cache, md5)
                raise
            return "a sound copy is in its place" + ("; the damaged one is in quarantine" if kind == DAMAGED else "")

        remedy = f"proteus model pull {version.reference} --force"
        return self._mended(Finding(version.reference, "weights", kind, what, remedy), bring)

    def _digests(self, version: ModelVersion) -> Iterator[Finding]:
        """Check the tensors against the record; the objects are whole by now, so that the two can only disagree."""
        try:
            checkpoint = version.checkpoint
            touch(checkpoint)
            what = f"the weights of {version.reference} do not have the SHA-256 in its record"
            sound = version.record is None or version.record.weights.get("sha256") == sha256_of(version.files)
        except (IntegrityError, StorageError, ModelError) as error:
            what, sound = error.what, False
        if not sound:
            yield Finding(version.reference, "weights", DAMAGED, what, "do not use them; ask who registered them")

    def _remotes(self, version: ModelVersion, pointer: Pointer) -> Iterator[Finding]:
        try:
            listing = self._cache.listing(pointer)
        except IntegrityError:
            return
        md5s = [pointer.md5, *dict.fromkeys((listing or {}).values())] if pointer.is_folder else [pointer.md5]
        for remote in remotes(self._manager.root):
            try:
                sizes = {md5: remote.size(md5) for md5 in md5s}
                files = [size for md5, size in sizes.items() if md5 != pointer.md5]
                # Never pushed there is no fault; what other versions share with it may be there all the same.
                if sizes[pointer.md5] is None and not (files and None not in files):
                    continue
                for md5, size in sizes.items():
                    if finding := self._remote_object(version, remote, md5, size):
                        yield finding
            except StorageError as error:
                yield Finding(version.reference, "remote", MISSING, error.what, error.remedy)

    def _remote_object(self, version: ModelVersion, remote: DvcRemote, md5: str, size: int | None) -> Finding | None:
        here = self._cache.object(md5)
        sound = self._cache.is_sound(md5)
        what = None
        if size is None:
            what = f"DVC remote {remote.name} lacks {md5} of {version.reference}"
        elif sound and here.stat().st_size != size:
            what = (
                f"{md5} of {version.reference} on DVC remote {remote.name} has {size} bytes, not {here.stat().st_size}"
            )
        elif (self._deep or not sound) and not self._remote_is_sound(remote, md5):
            what = f"{md5} of {version.reference} on DVC remote {remote.name} is not what its name says"
        if what is None:
            return None
        kind = MISSING if size is None else DAMAGED
        finding = Finding(version.reference, "remote", kind, what, f"proteus model push {version.reference}")

        def push() -> str:
            if not sound:
                raise StorageError("no sound copy is here", "push it from a machine that has one")
            if size is not None:
                kept = private_folder(self._manager.root) / "quarantine" / f"{md5}-{secrets.token_hex(4)}"
                kept.parent.mkdir(exist_ok=True)
                remote.fetch(md5, kept)
                remote.remove(md5)
            remote.push(md5, here)
            return "sent again" + ("; the damaged one is in quarantine here" if size is not None else "")

        return self._mended(finding, push)

    def _remote_is_sound(self, remote: DvcRemote, md5: str) -> bool:
        with scratch_folder(self._manager.root, "verify") as scratch:
            copy = scratch / md5
            return remote.fetch(md5, copy) and md5_file(copy) == md5.removesuffix(".dir")

    def _backups(self) -> Iterator[Finding]:
        backups = Backups(self._manager.root)
        for path, error in backups.unreadable():
            if self._name in {"", path.stem.partition("@")[0]}:
                yield Finding(path.stem, "backup", DAMAGED, error.what, error.remedy)
        for backup in backups.list():
            if not self._concerns(backup.tag, backup.reference.partition("@")[0]):
                continue
            for md5 in backup.objects:
                if not backups.objects.is_sound(md5):
                    yield self._backup_finding(backups, backup.reference, md5)
        for history in self._manager.histories(self._name or None):
            for reference in _backed_up(history):
                if self._tag in {None, reference} and not backups.path(reference).exists():
                    what = f"{reference} was deleted with a backup, which is not here ({backups.path(reference)})"
                    remedy = f"proteus model restore {reference} while its weights can be had, then delete it again"
                    elsewhere = "the clone that deleted it has the backup"
                    yield Finding(reference, "backup", MISSING, what, f"{remedy}; {elsewhere}")

    def _backup_finding(self, backups: Backups, reference: str, md5: str) -> Finding:
        path = backups.objects.object(md5)
        kind = DAMAGED if path.exists() else MISSING
        what = f"{md5} is {kind} in the backup of {reference} ({path})"

        def bring() -> str:
            mend(self._manager.root, [md5], reference, backups.objects)
            return "a sound copy is in its place" + ("; the damaged one is in quarantine" if kind == DAMAGED else "")

        return self._mended(Finding(reference, "backup", kind, what, "bring a copy of it from elsewhere"), bring)

    def _dependencies(self, histories: list[History]) -> Iterator[Finding]:
        live = {f"{h.name}@v{n}" for h in self._manager.histories(None) for n in h.live}
        for history in histories:
            for number, event in history.live.items():
                reference = f"{history.name}@v{number}"
                for dependency in event.record.dependencies if event.record else ():
                    if dependency not in live:
                        what = f"{reference} depends on {dependency}, which is not registered here"
                        remedy = f"proteus model restore {dependency}, or fetch its tag"
                        yield Finding(reference, "dependencies", MISSING, what, remedy)

    def _lock(self) -> Iterator[Finding]:
        """Check that models.lock names versions that are here, with the digests they have."""
        from proteus_pipeline.registry.lock import Locked, read_lock

        remedy = "find out which is right, then: proteus model lock --update"
        try:
            locked = read_lock(self._manager.root / "models.lock")
        except ConfigError as error:
            yield Finding("models.lock", "lock", DAMAGED, error.what, error.remedy)
            return
        for reference, entry in locked.items():
            name = reference.partition("@")[0]
            if self._name and name != self._name:
                continue
            event = self._manager.history(name).live.get(entry.version)
            if event is None:
                what = f"models.lock says that {reference} is v{entry.version}, which is not registered here"
                yield Finding(
                    reference, "lock", MISSING, what, f"fetch its tag, or: proteus model pull {name}@v{entry.version}"
                )
            elif event.record and entry != Locked(entry.version, event.record.model_digest, event.record.trunk_digest):
                what = f"models.lock says that {reference} is v{entry.version} with other weights than that version has"
                yield Finding(reference, "lock", DAMAGED, what, remedy)

    def _mended(self, finding: Finding, repair: Callable[[], str]) -> Finding:
        """Return the finding, with what was done about it where something could be."""
        if not self._repair:
            return finding
        try:
            return replace(finding, repaired=repair())
        except ProteusError as error:
            return replace(finding, remedy=f"{finding.remedy} (not mended: {error.what})")


def _backed_up(history: History) -> list[str]:
    """Return the deleted versions whose last deletion says that there is a backup."""
    last = {e.version: e.told for e in history.events if e.kind == "deleted" and e.version not in history.live}
    return [f"{history.name}@v{number}" for number, told in last.items() if told and told.details.get("backup")]
