from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from conftest import git, make_checkpoint
from registering import Given, commit, flip, objects

from proteus_pipeline.errors import (
    ConfigError,
    IntegrityError,
    StorageError,
    VersionConflictError,
    VersionNotFoundError,
)
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry.backups import Backups
from proteus_pipeline.registry.home import open_home
from proteus_pipeline.registry.versions import ModelVersionManager
from proteus_pipeline.registry.weights import DvcCache

MODELS = [make_checkpoint(seed=i) for i in range(5)]


@pytest.fixture(params=["project", "own home"])
def manager(request: pytest.FixtureRequest, repository: Path, tmp_path: Path) -> ModelVersionManager:
    """Both homes: a project's repository, and one that the registry makes itself."""
    if request.param == "project":
        return ModelVersionManager(repository)
    open_home(tmp_path / "home")
    return ModelVersionManager(tmp_path / "home")


def register(manager: ModelVersionManager, *versions: str, name: str = "m", **more: object) -> None:
    for version in versions:
        model = MODELS[len(manager.history(name).known) % len(MODELS)]
        manager.register_version(Given(name, model), version, **more)


def live(manager: ModelVersionManager, name: str = "m") -> list[str]:
    return [v.version for v in manager.list_versions(name)]


def test_rollback_makes_a_version_current_and_rewrites_nothing(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0")
    tags = git(manager.root, "for-each-ref", "refs/tags")
    version = manager.rollback("m", "1.0.0", reason="1.1.0 is worse")
    assert (version.version, version.current) == ("1.0.0", True)
    assert manager.resolve("m").version == "1.0.0"
    assert manager.resolve("m@latest").version == "1.1.0"
    after = git(manager.root, "for-each-ref", "refs/tags")
    assert set(tags.splitlines()) < set(after.splitlines())
    event = manager.history("m").events[-1]
    assert (event.kind, event.version, event.reason) == ("made current", "1.0.0", "1.1.0 is worse")
    assert re.fullmatch(r"m#current#3\d{6}", event.tag)
    assert manager.rollback("m", "1.0.0").current
    assert git(manager.root, "for-each-ref", "refs/tags") == after, "what is current already is no event"
    manager.rollback("m", "1.1.0")
    register(manager, "1.2.0")
    assert manager.resolve("m").version == "1.2.0"


def test_rollback_looks_at_the_bytes_before_it_moves(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0")
    files = manager.get_version("m", "1.0.0").files
    whole = files["model-layer-1.safetensors"].read_bytes()
    flip(files["model-layer-1.safetensors"])
    with pytest.raises(IntegrityError, match="are damaged, and no sound copy was found"):
        manager.rollback("m", "1.0.0")
    assert manager.resolve("m").version == "1.1.0"
    assert files["model-layer-1.safetensors"].exists(), "what is damaged stays where it is until it can be mended"
    files["model-layer-1.safetensors"].unlink()
    with pytest.raises(StorageError, match="not in the DVC cache, and not in backups"):
        manager.rollback("m", "1.0.0")
    files["model-layer-1.safetensors"].write_bytes(whole)
    assert manager.rollback("m", "1.0.0").current


@pytest.mark.parametrize("version", ["3.0.0", "1.0.0"])
def test_rollback_to_what_is_not_live_is_not_found(manager: ModelVersionManager, version: str):
    register(manager, "1.0.0", "1.1.0")
    manager.delete_version("m", "1.0.0")
    with pytest.raises(VersionNotFoundError, match=f"has no version v{version}"):
        manager.rollback("m", version)


def test_what_was_current_on_a_date_is_known(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0")
    manager.rollback("m", "1.0.0")
    history = manager.history("m")
    times = [e.time for e in history.events]
    assert history.current_at(times[0] - 1) is None
    assert history.current_at(times[-1] + 9) == "1.0.0"
    assert history.currents == ("1.0.0", "1.1.0", "1.0.0")


def test_a_deleted_version_is_gone_but_its_tag_and_backup_and_comes_back_to_the_bit(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0")
    before, tag = objects(manager.root), git(manager.root, "rev-parse", "m@v1.0.0")
    deletion = manager.delete_version("m", "1.0.0", reason="not used")
    assert (live(manager), deletion.needed, deletion.backup) == (["1.1.0"], (), True)
    gone = before.keys() - objects(manager.root).keys()
    assert sum(len(before[o]) for o in gone) == deletion.frees > 0
    assert {o.replace("/", "") for o in gone} == set(deletion.drops)
    assert git(manager.root, "rev-parse", "m@v1.0.0") == tag
    assert re.search(r"^m@v1\.0\.0!#3\d{6}$", git(manager.root, "tag"), re.MULTILINE)
    assert Backups(manager.root).is_verified("m@v1.0.0")
    with pytest.raises(VersionConflictError, match=r"never used again; .*proteus model restore"):
        manager.register_version(Given("m", MODELS[0]), "1.0.0")
    again = manager.delete_version("m", "1.0.0")
    assert (again.done, again.drops) == (True, ())
    version = manager.restore_version("m", "1.0.0", reason="needed after all")
    assert objects(manager.root) == before
    assert all(torch.equal(version.checkpoint.tensors[n], t) for n, t in MODELS[0].tensors.items())
    assert live(manager) == ["1.0.0", "1.1.0"]
    assert manager.resolve("m").version == "1.1.0"
    assert [e.kind for e in manager.history("m").events] == ["registered", "registered", "deleted", "restored"]
    assert Backups(manager.root).list() == []
    assert manager.verify() == []


def test_a_version_may_be_deleted_and_restored_over_and_over(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0")
    before = objects(manager.root)
    for _ in range(3):
        manager.delete_version("m", "1.0.0")
        assert live(manager) == ["1.1.0"]
        manager.restore_version("m", "1.0.0")
        assert (live(manager), objects(manager.root)) == (["1.0.0", "1.1.0"], before)


def test_restoring_what_is_not_deleted_changes_nothing(manager: ModelVersionManager):
    register(manager, "1.0.0")
    refs = git(manager.root, "for-each-ref")
    assert manager.restore_version("m", "1.0.0").version == "1.0.0"
    assert git(manager.root, "for-each-ref") == refs
    with pytest.raises(VersionNotFoundError):
        manager.restore_version("m", "2.0.0")
    with pytest.raises(VersionNotFoundError):
        manager.delete_version("m", "2.0.0")


def test_what_others_need_is_not_deleted_unless_forced(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0")
    register(manager, "1.0.0", name="head", dependencies=["m@1.0.0"])
    with pytest.raises(
        VersionConflictError, match=r"m@v1\.0\.0 can't be deleted: head@v1\.0\.0 depends on it; roll back"
    ):
        manager.delete_version("m", "1.0.0")
    with pytest.raises(VersionConflictError, match=r"m@v1\.1\.0 can't be deleted: it is the current version"):
        manager.delete_version("m", "1.1.0")
    assert [v.reference for v in manager.dependents("m@1.0.0")] == ["head@v1.0.0"]
    assert manager.plan_deletion("m", "1.0.0").needed == ("head@v1.0.0 depends on it",)
    assert live(manager) == ["1.0.0", "1.1.0"]
    deletion = manager.delete_version("m", "1.0.0", force=True)
    assert deletion.needed == ("head@v1.0.0 depends on it",)
    told = manager.history("m").events[-1].told
    assert told
    assert told.details["forced"] == ["head@v1.0.0 depends on it"]
    [finding] = manager.verify()
    assert finding.what == "head@v1.0.0 depends on m@v1.0.0, which is not registered here"


def test_bytes_that_other_versions_share_stay(manager: ModelVersionManager):
    base = MODELS[0]
    name = "esm.encoder.layer.1.output.dense.weight"
    changed = Checkpoint(base.architecture, {**base.tensors, name: base.tensors[name] + 1})
    manager.register_version(Given("m", base), "1.0.0")
    manager.register_version(Given("m", changed), "1.1.0")
    manager.delete_version("m", "1.0.0")
    assert manager.get_version("m", "1.1.0").checkpoint.model_digest == changed.model_digest
    assert manager.verify() == []
    assert manager.restore_version("m", "1.0.0").checkpoint.model_digest == base.model_digest


def test_without_a_backup_a_deletion_drops_the_bytes_and_a_remote_or_nothing_brings_them_back(repository: Path):
    manager = ModelVersionManager(repository, backup_enabled=False)
    register(manager, "1.0.0", "1.1.0")
    deletion = manager.delete_version("m", "1.0.0")
    assert (deletion.backup, deletion.frees > 0) == (False, True)
    assert Backups(repository).list() == []
    with pytest.raises(StorageError, match="are not in the DVC cache, and not in backups"):
        manager.restore_version("m", "1.0.0")
    assert live(manager) == ["1.1.0"]


def test_no_backup_no_deletion(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0")
    flip(manager.get_version("m", "1.0.0").files["model-layer-0.safetensors"])
    before = objects(manager.root)
    with pytest.raises(IntegrityError):
        manager.delete_version("m", "1.0.0")
    assert (live(manager), objects(manager.root)) == (["1.0.0", "1.1.0"], before)
    assert "m@v1.0.0!" not in git(manager.root, "tag")


def test_a_damaged_backup_drops_nothing_and_restores_nothing(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0")
    dropped = manager.delete_version("m", "1.0.0").drops[0]
    flip(Backups(manager.root).objects.object(dropped))
    with pytest.raises(StorageError):
        manager.restore_version("m", "1.0.0")
    assert live(manager) == ["1.1.0"]
    assert [f.part for f in manager.verify()] == ["backup"]


def test_beyond_the_limit_the_oldest_go_and_are_named(manager: ModelVersionManager, caplog: pytest.LogCaptureFixture):
    limited = ModelVersionManager(manager.root, max_versions=3)
    with caplog.at_level(logging.WARNING):
        register(limited, "1.0.0", "1.1.0", "0.9.0")
        assert not caplog.records
        register(limited, "1.2.0", "1.3.0")
    assert live(limited) == ["0.9.0", "1.2.0", "1.3.0"]
    assert [r.args[0] for r in caplog.records if r.args] == ["m@v1.0.0", "m@v1.1.0"]
    assert all(Backups(manager.root).is_verified(f"m@v{v}") for v in ("1.0.0", "1.1.0"))
    assert limited.restore_version("m", "1.0.0").checkpoint.model_digest == MODELS[0].model_digest


def test_the_limit_spares_what_is_needed_and_says_so(manager: ModelVersionManager, caplog: pytest.LogCaptureFixture):
    limited = ModelVersionManager(manager.root, max_versions=2)
    register(limited, "1.0.0", "1.1.0")
    limited.rollback("m", "1.0.0")
    register(limited, "1.0.0", name="n", dependencies=["m@1.1.0"])
    with caplog.at_level(logging.WARNING):
        register(limited, "0.5.0")
    assert live(limited) == ["0.5.0", "1.0.0", "1.1.0"]
    assert "m has more than 2 versions, and all others are needed" in caplog.text


def test_retired_without_backups_keeps_the_bytes(repository: Path):
    limited = ModelVersionManager(repository, backup_enabled=False, max_versions=1)
    register(limited, "1.0.0")
    before = objects(repository)
    register(limited, "1.1.0")
    assert live(limited) == ["1.1.0"]
    assert before.items() <= objects(repository).items()
    assert limited.restore_version("m", "1.0.0").checkpoint.model_digest == MODELS[0].model_digest


def test_no_limit_keeps_all(manager: ModelVersionManager):
    unlimited = ModelVersionManager(manager.root, max_versions=None)
    register(unlimited, *(f"1.{n}.0" for n in range(12)))
    assert len(live(unlimited)) == 12
    planned = unlimited.prune("m", 4, dry_run=True)
    assert (len(live(unlimited)), [d.reference for d in planned]) == (12, [f"m@v1.{n}.0" for n in range(8)])
    assert [d.reference for d in unlimited.prune("m", 4)] == [d.reference for d in planned]
    assert live(unlimited) == ["1.8.0", "1.9.0", "1.10.0", "1.11.0"]
    assert unlimited.prune("m", 4) == []


@pytest.mark.parametrize("limit", [0, -1, True])
def test_a_limit_below_one_is_refused(repository: Path, limit: int):
    with pytest.raises(ConfigError, match="max_versions is"):
        ModelVersionManager(repository, max_versions=limit)


def test_pruning_what_is_not_there_or_to_nothing_is_refused(manager: ModelVersionManager):
    with pytest.raises(VersionNotFoundError):
        manager.prune("m", 1)
    with pytest.raises(ConfigError, match="keep is 0"):
        manager.prune("m", 0)


def test_a_cache_that_other_projects_may_share_loses_nothing(repository: Path, tmp_path: Path):
    (repository / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {tmp_path / 'shared'}\n")
    manager = ModelVersionManager(repository)
    register(manager, "1.0.0", "1.1.0")
    cache = DvcCache(repository)
    before = sorted(p for p in cache.folder.rglob("*") if p.is_file())
    assert manager.delete_version("m", "1.0.0").frees == 0
    assert sorted(p for p in cache.folder.rglob("*") if p.is_file()) == before


def test_bytes_that_a_branch_points_to_stay(repository: Path):
    manager = ModelVersionManager(repository)
    register(manager, "1.0.0", on_branch=True)
    register(manager, "1.1.0")
    assert manager.delete_version("m", "1.0.0").frees == 0
    (repository / "models" / "m.dvc").unlink()
    commit(repository)
    git(repository, "tag", "paper")
    git(repository, "rm", "--quiet", "-r", "--cached", "--ignore-unmatch", "models")
    commit(repository)
    assert manager.delete_version("m", "1.0.0").frees > 0, "repeating it drops what nothing points to any more"


def test_a_tag_for_another_purpose_stops_nobody_and_can_be_deleted(repository: Path):
    manager = ModelVersionManager(repository, max_versions=2)
    register(manager, "1.0.0", "1.1.0")
    git(repository, "tag", "frontend@v3.2.1")
    register(manager, "1.2.0")
    assert live(manager) == ["1.1.0", "1.2.0"]
    assert manager.delete_version("frontend", "3.2.1", force=True).drops == ()
    assert live(manager, "frontend") == []


def test_where_a_live_version_s_list_is_not_here_nothing_is_dropped(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0")
    cache = DvcCache(manager.root)
    listing = cache.object(manager.get_version("m", "1.1.0").pointer.md5)
    aside = listing.rename(manager.root / "aside")
    assert manager.delete_version("m", "1.0.0").frees == 0
    aside.rename(listing)
    assert manager.verify("m@v1.1.0") == []
    assert manager.delete_version("m", "1.0.0").frees > 0, "repeating it drops what was left"


def test_a_version_whose_tag_git_lost_comes_back_from_its_backup(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0")
    commit = git(manager.root, "rev-parse", "m@v1.0.0^{commit}")
    oid, digest = git(manager.root, "rev-parse", "m@v1.0.0"), MODELS[0].model_digest
    manager.delete_version("m", "1.0.0")
    git(manager.root, "update-ref", "refs/heads/kept", commit)
    for tag in git(manager.root, "tag", "--list", "m@v1.0.0*").splitlines():
        git(manager.root, "update-ref", "-d", f"refs/tags/{tag}")
        git(manager.root, "update-ref", "-d", f"refs/proteus/ledger/{tag}")
    git(manager.root, "gc", "--quiet", "--prune=now")
    with pytest.raises(VersionNotFoundError):
        manager.get_version("m", "1.0.0")
    assert manager.restore_version("m", "1.0.0").checkpoint.model_digest == digest
    assert git(manager.root, "rev-parse", "m@v1.0.0") == oid


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tag", "x\ndelete refs/heads/precious\ncommit\nstart\ncreate refs/tags/z"),
        ("tag", "q@v3.0.0"),
        ("reference", "q@v3.0.0"),
        ("tag_object", "object x\ntype commit\ntag m@v1.0.0\n\nno record"),
    ],
)
def test_an_edited_backup_writes_no_other_ref(manager: ModelVersionManager, field: str, value: str):
    register(manager, "1.0.0", "1.1.0")
    manager.delete_version("m", "1.0.0")
    git(manager.root, "branch", "precious", "m@v1.0.0^{commit}")
    for tag in git(manager.root, "tag", "--list", "m@v1.0.0*").splitlines():
        git(manager.root, "update-ref", "-d", f"refs/tags/{tag}")
        git(manager.root, "update-ref", "-d", f"refs/proteus/ledger/{tag}")
    path = Backups(manager.root).path("m@v1.0.0")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refs = git(manager.root, "for-each-ref")
    with pytest.raises((IntegrityError, VersionNotFoundError)):
        manager.restore_version("m", "1.0.0")
    assert git(manager.root, "for-each-ref") == refs


def test_while_a_backup_cant_be_read_no_backup_s_bytes_go(manager: ModelVersionManager):
    register(manager, "1.0.0", "1.1.0", "1.2.0")
    for number in ("1.0.0", "1.1.0"):
        manager.delete_version("m", number)
    backups = Backups(manager.root)
    path = backups.path("m@v1.1.0")
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    there = {p.name for p in backups.objects.folder.rglob("*") if p.is_file()}
    assert manager.restore_version("m", "1.0.0").version == "1.0.0"
    assert {p.name for p in backups.objects.folder.rglob("*") if p.is_file()} == there
    assert {f.part for f in manager.verify()} == {"backup"}


def test_what_is_left_of_another_backup_stops_no_restoration(
    manager: ModelVersionManager, caplog: pytest.LogCaptureFixture
):
    register(manager, "1.0.0", "1.1.0")
    manager.delete_version("m", "1.0.0")
    left = Backups(manager.root).path("m@v0.9.0").with_suffix(".released")
    left.write_text("{")
    assert manager.restore_version("m", "1.0.0").version == "1.0.0"
    assert left.exists()
    assert "m@v0.9.0.released is damaged" in caplog.text
