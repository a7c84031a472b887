"""Every kind of damage is found before a tensor is used, named by verify, and mended where a good copy exists."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import git, make_checkpoint
from registering import Given, commit, flip

from proteus_pipeline.errors import IntegrityError, ProteusError, StorageError, VersionNotFoundError
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry.backups import Backups
from proteus_pipeline.registry.lock import Locked, write_lock
from proteus_pipeline.registry.records import VersionRecord
from proteus_pipeline.registry.supply import send
from proteus_pipeline.registry.verification import Finding
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.versions import ModelVersionManager
from proteus_pipeline.registry.weights import DvcCache, Objects

WHO = ("-c", "user.name=X", "-c", "user.email=x@example.org")


@pytest.fixture
def manager(repository: Path, tmp_path: Path, tiny: Checkpoint) -> ModelVersionManager:
    """A registry of two versions, with a DVC remote in a folder."""
    (repository / ".dvc" / "config").write_text(
        f"[core]\n    analytics = false\n    remote = hub\n['remote \"hub\"']\n    url = {tmp_path / 'hub'}\n"
    )
    commit(repository)
    manager = ModelVersionManager(repository)
    manager.register_version(Given("m", tiny), "1.0.0")
    manager.register_version(Given("m", make_checkpoint(seed=1)), "1.1.0")
    return manager


def first(manager: ModelVersionManager) -> ModelVersion:
    return manager.get_version("m", "1.0.0")


def pushed(manager: ModelVersionManager) -> Objects:
    send(manager.root, first(manager).pointer, "m@v1.0.0")
    return Objects(manager.root.parent / "hub" / "files" / "md5")


def use(manager: ModelVersionManager) -> None:
    """Read every tensor of the first version."""
    dict(first(manager).checkpoint.tensors.items())


def codes(findings: list[Finding]) -> set[tuple[str, str, int]]:
    return {(f.part, f.kind, f.exit_code) for f in findings}


def test_a_sound_registry_has_no_findings(manager: ModelVersionManager):
    assert manager.verify() == []
    pushed(manager)
    assert manager.verify(deep=True) == []
    assert manager.verify("m@v1.0.0") == []
    with pytest.raises(VersionNotFoundError):
        manager.verify("m@v9.0.0")


@pytest.mark.parametrize("victim", ["model-layer-1.safetensors", "config.json", "digests.json", "the list of files"])
def test_a_flipped_bit_is_found_before_use_and_mended_from_the_remote(manager: ModelVersionManager, victim: str):
    pushed(manager)
    version = first(manager)
    cache = DvcCache(manager.root)
    path = version.files[victim] if victim in version.files else cache.object(version.pointer.md5)
    flip(path, 100)
    damaged = path.read_bytes()
    with pytest.raises(IntegrityError):
        use(manager)
    assert codes(manager.verify()) == {("weights", "damaged", 4)}
    assert path.read_bytes() == damaged, "looking changes nothing"
    [finding] = manager.verify(repair=True)
    assert finding.repaired == "a sound copy is in its place; the damaged one is in quarantine"
    use(manager)
    assert manager.verify() == []
    kept = [p.read_bytes() for p in (manager.root / ".proteus" / "quarantine").iterdir()]
    assert kept == [damaged], "nothing is deleted"


def test_without_a_good_copy_what_is_damaged_goes_to_quarantine_and_is_named(manager: ModelVersionManager):
    path = first(manager).files["model-layer-1.safetensors"]
    flip(path)
    [finding] = manager.verify(repair=True)
    assert (finding.repaired, finding.exit_code) == (None, 4)
    assert "not mended: " in finding.remedy
    assert not path.exists(), "so that DVC does not hand it out either"
    assert codes(manager.verify()) == {("weights", "missing", 3)}
    with pytest.raises(StorageError, match=r"not in the DVC cache, and not in backups, DVC remote hub"):
        use(manager)
    assert manager.get_version("m", "1.1.0").checkpoint.digests


def test_weights_lost_to_a_dvc_gc_come_back_from_the_remote(manager: ModelVersionManager, tiny: Checkpoint):
    pushed(manager)
    shutil.rmtree(manager.root / ".dvc" / "cache")
    findings = manager.verify("m@v1.0.0")
    assert codes(findings) == {("weights", "missing", 3)}
    assert first(manager).checkpoint.model_digest == tiny.model_digest, "a use fetches them, too"
    assert manager.verify("m@v1.0.0") == []
    shutil.rmtree(manager.root / ".dvc" / "cache")
    assert all(f.repaired for f in manager.verify("m@v1.0.0", repair=True))
    assert manager.verify("m@v1.0.0") == []
    use(manager)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_remote_object_is_refused_on_the_way_and_mended_from_here(manager: ModelVersionManager, how: str):
    hub = pushed(manager)
    md5 = next(m for m in (DvcCache(manager.root).listing(first(manager).pointer) or {}).values())
    path = hub.object(md5)
    path.chmod(0o644)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        flip(path)
    assert codes(manager.verify(deep=True)) == {("remote", "damaged", 4)}
    assert codes(manager.verify()) == ({("remote", "damaged", 4)} if how == "truncated" else set())
    aside = manager.root.parent / "aside"
    shutil.move(manager.root / ".dvc" / "cache", aside)
    with pytest.raises(IntegrityError, match=f"DVC remote hub sent {md5} damaged"):
        use(manager)
    assert not DvcCache(manager.root).object(md5).exists(), "what is damaged is never published"
    assert ("remote", "damaged", 4) in codes(manager.verify()), "found without a copy here to compare with"
    shutil.rmtree(manager.root / ".dvc" / "cache")
    shutil.move(aside, manager.root / ".dvc" / "cache")
    [finding] = manager.verify(deep=True, repair=True)
    assert finding.repaired == "sent again; the damaged one is in quarantine here"
    assert manager.verify(deep=True) == []


def test_a_remote_that_lacks_a_part_is_completed_and_one_that_has_nothing_is_no_fault(manager: ModelVersionManager):
    hub = pushed(manager)
    hub.object(first(manager).pointer.md5).unlink()
    assert codes(manager.verify()) == {("remote", "missing", 3)}
    assert all(f.repaired for f in manager.verify(repair=True))
    assert manager.verify() == []
    shutil.rmtree(manager.root.parent / "hub")
    assert manager.verify() == []


def move(root: Path) -> None:
    """Move the tag to another version's commit, message and all, as `git tag --force` does."""
    message = git(root, "for-each-ref", "--format=%(contents)", "refs/tags/m@v1.0.0") + "\n"
    git(root, *WHO, "tag", "-f", "-a", "--cleanup=verbatim", "-m", message, "m@v1.0.0", "m@v1.1.0^{commit}")


def lighten(root: Path) -> None:
    """Put a lightweight tag in its place, which has no record."""
    git(root, "tag", "-f", "m@v1.0.0", "m@v1.1.0^{commit}")


def edit(root: Path) -> None:
    """Edit the record by hand."""
    message = git(root, "for-each-ref", "--format=%(contents)", "refs/tags/m@v1.0.0") + "\n"
    edited = message.replace('"reason":""', '"reason":"trust me"')
    assert edited != message
    git(root, *WHO, "tag", "-f", "-a", "--cleanup=verbatim", "-m", edited, "m@v1.0.0", "m@v1.0.0^{commit}")


def forge(root: Path) -> None:
    """Write another record whose checksum fits."""
    manager = ModelVersionManager(root)
    record = manager.get_version("m", "1.1.0").record
    assert isinstance(record, VersionRecord)
    message = VersionRecord(**{**vars(record), "version": "1.0.0"}).message()
    git(root, *WHO, "tag", "-f", "-a", "--cleanup=verbatim", "-m", message, "m@v1.0.0", "m@v1.1.0^{commit}")


@pytest.mark.parametrize("meddle", [move, lighten, edit, forge])
def test_a_tag_that_was_moved_or_edited_is_found_before_use_and_put_back(
    manager: ModelVersionManager, tiny: Checkpoint, meddle: Callable[[Path], None]
):
    oid = git(manager.root, "rev-parse", "m@v1.0.0")
    meddle(manager.root)
    moved = git(manager.root, "rev-parse", "m@v1.0.0")
    with pytest.raises(IntegrityError) as caught:
        use(manager)
    assert caught.value.exit_code == 4
    assert ("tag", "damaged", 4) in codes(manager.verify())
    assert git(manager.root, "rev-parse", "m@v1.0.0") == moved
    [finding] = manager.verify(repair=True)
    assert finding.repaired == f"put back to {oid[:12]}"
    assert first(manager).checkpoint.model_digest == tiny.model_digest
    assert manager.verify() == []
    kept = git(manager.root, "for-each-ref", "--format=%(objectname)", "refs/proteus/quarantine")
    assert kept == moved, "it may be somebody's work"


def test_a_removed_tag_is_put_back(manager: ModelVersionManager):
    git(manager.root, "tag", "-d", "m@v1.0.0")
    [finding] = manager.verify()
    assert (finding.part, finding.exit_code) == ("tag", 3)
    assert manager.verify(repair=True)[0].repaired
    assert manager.verify() == []
    use(manager)


def test_a_removed_or_moved_event_is_found_too(manager: ModelVersionManager):
    manager.rollback("m", "1.0.0")
    tag = manager.history("m").events[-1].tag
    git(manager.root, "tag", "-d", tag)
    assert manager.resolve("m").version == "1.1.0"
    assert [f.about for f in manager.verify(repair=True)] == [tag]
    assert manager.resolve("m").version == "1.0.0"


def test_in_a_clone_a_damaged_record_is_fetched_again_from_its_remote(
    manager: ModelVersionManager, tmp_path: Path, tiny: Checkpoint
):
    git(tmp_path, "clone", "--quiet", "--bare", str(manager.root), "bare.git")
    git(tmp_path, "clone", "--quiet", "bare.git", "clone")
    clone = ModelVersionManager(tmp_path / "clone")
    edit(clone.root)
    with pytest.raises(IntegrityError, match="was edited or damaged: its checksum does not fit"):
        clone.get_version("m", "1.0.0")
    assert ("record", "damaged", 4) in codes(clone.verify())
    repaired = [f.repaired for f in clone.verify(repair=True) if f.part == "record"]
    assert repaired == ["fetched from origin"]
    record = clone.get_version("m", "1.0.0").record
    assert record
    assert record.model_digest == tiny.model_digest
    # From now on the ledger knows the tag.
    edit(clone.root)
    assert ("tag", "damaged", 4) in codes(clone.verify())


def test_in_a_clone_a_tag_is_entered_when_it_is_first_used(manager: ModelVersionManager, tmp_path: Path):
    pushed(manager)
    git(tmp_path, "clone", "--quiet", str(manager.root), "clone")
    clone = ModelVersionManager(tmp_path / "clone")
    assert git(clone.root, "for-each-ref", "refs/proteus") == ""
    use(clone)
    ledger = git(clone.root, "for-each-ref", "--format=%(refname) %(objectname)", "refs/proteus")
    assert ledger == f"refs/proteus/ledger/m@v1.0.0 {git(clone.root, 'rev-parse', 'm@v1.0.0')}"
    lighten(clone.root)
    with pytest.raises(IntegrityError, match="was moved or edited"):
        use(clone)


def test_a_pointer_that_git_lost_is_written_again(manager: ModelVersionManager):
    oid = git(manager.root, "rev-parse", "m@v1.0.0:models/m.dvc")
    (manager.root / ".git" / "objects" / oid[:2] / oid[2:]).unlink()
    with pytest.raises(IntegrityError, match=r"has no models/m\.dvc"):
        use(manager)
    assert ("pointer", "damaged", 4) in codes(manager.verify())
    assert all(f.repaired for f in manager.verify(repair=True))
    use(manager)
    assert manager.verify() == []


def test_a_pointer_that_was_deleted_in_the_working_tree_is_written_again(manager: ModelVersionManager):
    manager.register_version(Given("m", make_checkpoint(seed=2)), "1.2.0", on_branch=True)
    path = manager.root / "models" / "m.dvc"
    text = path.read_text()
    path.unlink()
    assert codes(manager.verify()) == {("pointer", "missing", 3)}
    assert all(f.repaired for f in manager.verify(repair=True))
    assert path.read_text() == text
    path.unlink()
    git(manager.root, "rm", "--quiet", "--cached", "models/m.dvc")
    assert manager.verify() == [], "removed in the index too: somebody means it"


def test_a_record_that_says_other_weights_than_there_are_is_found(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    version = first(manager)
    assert version.record
    told = VersionRecord(**{**vars(version.record), "version": "5.0.0", "components": {"trunk": "0" * 32}})
    git(repository, *WHO, "tag", "-a", "--cleanup=verbatim", "-m", told.message(), "m@v5.0.0", version.commit)
    with pytest.raises(ProteusError) as caught:
        manager.get_version("m", "5.0.0").checkpoint  # noqa: B018
    assert caught.value.exit_code == 4
    assert {f.part for f in manager.verify("m@v5.0.0") if f.kind == "damaged"} == {"weights"}


def test_a_lock_that_says_something_else_is_found(manager: ModelVersionManager):
    locked = {
        "m@1.x": Locked.of(manager.get_version("m", "1.1.0")),
        "m@latest": Locked("1.1.0", "0" * 32, "0" * 32),
        "n@current": Locked("1.0.0", "0" * 32, "0" * 32),
    }
    write_lock(manager.root / "models.lock", locked)
    assert [(f.about, f.part, f.exit_code) for f in manager.verify()] == [
        ("m@latest", "lock", 4),
        ("n@current", "lock", 3),
    ]
    (manager.root / "models.lock").write_text("schema: 9\n")
    assert [(f.about, f.exit_code) for f in manager.verify()] == [("models.lock", 4)]


def test_a_backup_that_a_deletion_speaks_of_and_that_is_lost_or_unreadable_is_found(manager: ModelVersionManager):
    manager.delete_version("m", "1.0.0")
    assert manager.verify() == []
    path = Backups(manager.root).path("m@v1.0.0")
    path.write_text("{")
    assert [(f.about, f.part, f.exit_code) for f in manager.verify()] == [("m@v1.0.0", "backup", 4)]
    path.unlink()
    assert [(f.about, f.part, f.exit_code) for f in manager.verify("m@v1.0.0")] == [("m@v1.0.0", "backup", 3)]
    assert manager.verify("m@v1.1.0") == []


def test_a_damaged_backup_is_mended_from_a_remote_and_what_was_damaged_is_kept(manager: ModelVersionManager):
    version = first(manager)
    send(manager.root, version.pointer, version.reference)
    manager.delete_version("m", "1.0.0")
    backups = Backups(manager.root)
    dropped = [md5 for md5 in backups.list()[0].objects if not DvcCache(manager.root).object(md5).exists()]
    flip(backups.objects.object(dropped[0]))
    assert codes(manager.verify()) == {("backup", "damaged", 4)}
    assert codes(manager.verify(repair=True)) == {("backup", "damaged", 0)}
    assert manager.verify() == []
    assert [p.name.startswith(dropped[0]) for p in (manager.root / ".proteus" / "quarantine").iterdir()] == [True]
    assert manager.restore_version("m", "1.0.0").version == "1.0.0"


def test_a_model_whose_versions_are_all_deleted_is_verified_by_its_name(manager: ModelVersionManager):
    manager.delete_version("m", "1.0.0")
    manager.delete_version("m", "1.1.0", force=True)
    assert manager.verify("m") == []
    Backups(manager.root).path("m@v1.0.0").unlink()
    assert [f.part for f in manager.verify("m")] == ["backup"]
