from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import git, make_checkpoint
from registering import Given, commit

from proteus_pipeline.errors import (
    ConfigError,
    InvalidVersionError,
    StorageError,
    VersionConflictError,
    VersionNotFoundError,
)
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry.versions import ModelVersionManager


@pytest.fixture(scope="module")
def other() -> Checkpoint:
    return make_checkpoint(seed=1)


@pytest.fixture(params=["a repository of one's own", "a group's clone"])
def manager(request: pytest.FixtureRequest, repository: Path) -> ModelVersionManager:
    """Either manager: what is tested here holds for both."""
    if request.param == "a group's clone":
        # DVC writes it where dvc init has not.
        (repository / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
        (repository / ".git" / "info" / "exclude").write_text("/.dvc/.gitignore\n")
        return request.getfixturevalue("group").clone(repository)
    return ModelVersionManager(repository)


def state(root: Path) -> dict[str, Any]:
    """Everything of a repository that a registration leaves alone."""
    # The registry's own: .proteus/ keeps itself out of git, and git's folder holds the lock of registry changes. DVC's: tmp.
    own = {".git", "cache", ".proteus", "tmp"}
    files = [p for p in root.rglob("*") if p.is_file() and not own & set(p.relative_to(root).parts)]
    return {
        "head": git(root, "rev-parse", "HEAD"),
        "branch": git(root, "symbolic-ref", "HEAD"),
        "branches": git(root, "for-each-ref", "refs/heads"),
        "stash": git(root, "stash", "list"),
        "index": hashlib.sha256((root / ".git" / "index").read_bytes()).hexdigest(),
        "files": {str(p): p.read_bytes() for p in files},
        "git": sorted(p.name for p in (root / ".git").iterdir() if p.name != "proteus.lock"),
        "status": git(root, "status", "--porcelain=v2"),
    }


def make_untidy(root: Path) -> None:
    """Leave staged, unstaged and untracked changes, and one file that is both."""
    for name in ("both", "changed", "removed"):
        (root / name).write_text("committed\n")
    git(root, "add", ".")
    commit(root)
    (root / "both").write_text("staged\n")
    (root / "staged").write_text("staged\n")
    git(root, "add", "both", "staged")
    git(root, "rm", "--quiet", "removed")
    (root / "both").write_text("unstaged\n")
    (root / "changed").write_text("unstaged\n")
    (root / "untracked file").write_text("untracked\n")
    git(root, "status", "--porcelain=v2")  # git refreshes its index here, and not while we compare


def test_a_version_says_what_was_registered(manager: ModelVersionManager, tiny: Checkpoint):
    for name in ("base", "other"):
        manager.register_version(Given(name, tiny), "1.0.0")
    version = manager.register_version(
        Given("m", tiny, {"origin": "here"}),
        "v1.0.0",
        {"data": "UR50D"},
        configuration={"epochs": 3},
        dependencies=["base@1.0.0", "other"],
        reason="first",
        breaking="all",
    )
    record = version.record
    assert record is not None
    assert (version.reference, version.tag, version.current) == ("m@v1.0.0", "m@v1.0.0", True)
    assert (record.model_digest, record.components) == (tiny.model_digest, tiny.digests)
    assert record.architecture == json.loads(json.dumps(tiny.architecture.identity()))
    assert (record.metadata, record.configuration, record.source) == (
        {"data": "UR50D"},
        {"epochs": 3},
        {"origin": "here"},
    )
    assert record.dependencies == ("base@v1.0.0", "other@v1.0.0"), "resolved once, and recorded"
    assert (record.sequence, record.parent, record.reason, record.breaking) == (1, None, "first", "all")
    assert record.time.endswith("+00:00")
    assert manager.get_version("m", "1.0.0").record == record


def test_its_weights_come_back_to_the_bit(manager: ModelVersionManager, tiny: Checkpoint):
    manager.register_version(Given("m", tiny), "1.0.0")
    back = manager.get_version("m", "1.0.0").checkpoint
    assert back.architecture == tiny.architecture
    assert back.tensors.keys() == tiny.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tiny.tensors.items())


def test_where_git_knows_nobody_the_fallback_author_is_recorded_as_such(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, other: Checkpoint
):
    first = manager.register_version(Given("m", tiny), "1.0.0")
    assert first.record
    assert first.record.author == {"name": "proteus", "email": "proteus@localhost", "fallback": True}
    assert "tagger proteus <proteus@localhost>" in git(repository, "cat-file", "tag", "m@v1.0.0")
    git(repository, "config", "user.name", "Åsa")
    git(repository, "config", "user.email", "asa@example.org")
    second = manager.register_version(Given("m", other), "1.0.1")
    assert second.record
    assert second.record.author == {"name": "Åsa", "email": "asa@example.org", "fallback": False}
    assert (second.record.sequence, second.record.parent) == (2, "1.0.0")
    assert git(repository, "log", "-1", "--format=%an", "m@v1.0.1") == "Åsa"


def test_branch_index_tree_and_untracked_files_stay(manager: ModelVersionManager, repository: Path, tiny: Checkpoint):
    make_untidy(repository)
    before = state(repository)
    manager.register_version(Given("m", tiny), "1.0.0")
    assert state(repository) == before
    assert git(repository, "tag") == "m@v1.0.0"


@pytest.mark.parametrize("obstacle", ["cache", "scratch", "dvc.yaml", "objects"])
def test_all_of_it_stays_when_a_registration_fails_midway(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, obstacle: str
):
    make_untidy(repository)
    if obstacle == "cache":
        (repository / ".dvc" / "cache").mkdir()
        (repository / ".dvc" / "cache" / "files").touch()
    elif obstacle == "scratch":
        (repository / ".proteus").touch()
    elif obstacle == "dvc.yaml":
        (repository / "dvc.yaml").write_text("stages: [\n")
        git(repository, "add", "dvc.yaml")
        commit(repository)
        (repository / "dvc.yaml").write_text("stages: {}\n")
        git(repository, "status")
    else:
        for number in range(256):
            folder = repository / ".git" / "objects" / f"{number:02x}"
            if not folder.exists():
                folder.touch()  # git can't make the folder of a new object
    before = state(repository)
    with pytest.raises(StorageError) as caught:
        manager.register_version(Given("m", tiny), "1.0.0")
    assert "\n" not in str(caught.value)
    assert state(repository) == before
    assert git(repository, "tag") == ""


def test_the_tag_is_a_child_of_head_that_nothing_else_leads_to(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    (repository / "dvc.yaml").write_text("# ours\nstages: {}\n")
    git(repository, "add", "dvc.yaml")
    head = commit(repository)
    version = manager.register_version(Given("m", tiny), "1.0.0")
    assert git(repository, "rev-parse", f"{version.commit}^") == head
    assert git(repository, "diff", "--name-only", head, version.commit).split() == [
        "dvc.yaml",
        "models/.gitignore",
        "models/m.dvc",
    ]
    assert "# ours" in git(repository, "show", f"{version.commit}:dvc.yaml")
    assert git(repository, "branch", "--all", "--contains", version.commit) == ""


def test_the_tag_is_at_head_when_head_has_pointer_and_artifact(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    pointer, _ = manager.store_weights("m", tiny)
    (repository / "models").mkdir()
    (repository / "models" / "m.dvc").write_text(pointer.text())
    git(repository, "add", ".")
    without = commit(repository, "the pointer alone")
    assert manager.register_version(Given("m", tiny), "0.1.0").commit != without
    (repository / "dvc.yaml").write_text("artifacts:\n  m:\n    path: models/m\n")
    git(repository, "add", ".")
    head = commit(repository, "and the artifact")
    assert manager.register_version(Given("m", tiny), "1.0.0").commit == head
    second = manager.register_version(Given("m", tiny), "1.0.1")
    assert second.commit != head, "gto refuses two versions on one commit"
    assert second.checkpoint.model_digest == tiny.model_digest


def test_registering_the_same_again_changes_nothing(manager: ModelVersionManager, repository: Path, tiny: Checkpoint):
    first = manager.register_version(Given("m", tiny), "1.0.0", {"data": ("a", 1)})
    refs = git(repository, "for-each-ref")
    assert manager.register_version(Given("m", tiny), "1.0.0") == first
    assert manager.register_version(Given("m", tiny), "v1.0.0", {"data": ["a", 1]}) == first
    assert manager.register_version(Given("m", tiny), "v1.0.0", {"data": ("a", 1)}) == first
    assert git(repository, "for-each-ref") == refs


def test_other_weights_under_the_same_version_conflict_and_both_digests_are_shown(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, other: Checkpoint
):
    manager.register_version(Given("m", tiny), "1.0.0")
    refs = git(repository, "for-each-ref")
    with pytest.raises(VersionConflictError) as caught:
        manager.register_version(Given("m", other), "1.0.0")
    assert tiny.model_digest in str(caught.value)
    assert other.model_digest in str(caught.value)
    assert git(repository, "for-each-ref") == refs


@pytest.mark.parametrize("metadata", [{}, {"data": "b"}, {"data": "a", "more": 1}])
def test_other_metadata_under_the_same_version_conflict(
    manager: ModelVersionManager, tiny: Checkpoint, metadata: dict[str, Any]
):
    manager.register_version(Given("m", tiny), "1.0.0", {"data": "a"})
    with pytest.raises(VersionConflictError, match="other metadata"):
        manager.register_version(Given("m", tiny), "1.0.0", metadata)


@pytest.mark.parametrize("metadata", [{"a": object()}, {"a": float("nan")}, {("a",): 1}])
def test_metadata_that_no_record_can_hold_is_refused_before_anything_is_stored(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, metadata: dict[str, Any]
):
    with pytest.raises(ConfigError, match="the metadata is not JSON-like"):
        manager.register_version(Given("m", tiny), "1.0.0", metadata)
    assert not (repository / ".dvc" / "cache").exists()


def test_the_number_of_a_deleted_version_is_not_used_again(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, other: Checkpoint
):
    manager.register_version(Given("m", tiny), "1.0.0")
    manager.register_version(Given("m", other), "1.1.0")
    git(repository, "tag", "m@v1.1.0!", "m@v1.1.0^{commit}")
    assert [v.version for v in manager.list_versions("m")] == ["1.0.0"]
    assert manager.resolve("m").version == "1.0.0"
    with pytest.raises(VersionNotFoundError, match=r"no version v1\.1\.0.*it has v1\.0\.0"):
        manager.get_version("m", "1.1.0")
    for checkpoint in (tiny, other):
        with pytest.raises(VersionConflictError, match="was deleted, and a version number is never used again"):
            manager.register_version(Given("m", checkpoint), "1.1.0")
    assert manager.register_version(Given("m", other), "1.1.1").current


@pytest.mark.parametrize("name", ["", "a b", "-m", "m/", "a//b", "../m", "m.pt", "m@v1", "m#x", "é", "m\n", "x" * 101])
def test_bad_names_are_one_line(manager: ModelVersionManager, tiny: Checkpoint, name: str):
    with pytest.raises(InvalidVersionError) as caught:
        manager.register_version(Given(name, tiny), "1.0.0")
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidVersionError):
        manager.list_versions(name)


@pytest.mark.parametrize(
    "version", ["", "1", "1.0", "01.0.0", "1.0.0-", "1.0.0.0", "latest", "1.x", "1.0.0 ", "v", "\u0661.0.0"]
)
def test_bad_versions_are_one_line_with_the_nearest(manager: ModelVersionManager, tiny: Checkpoint, version: str):
    with pytest.raises(InvalidVersionError, match=r"no semantic version.*the nearest is \d") as caught:
        manager.register_version(Given("m", tiny), version)
    assert "\n" not in str(caught.value)


def test_a_bad_dependency_is_refused_before_anything_is_stored(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    with pytest.raises(InvalidVersionError, match=r"'1\.a'"):
        manager.register_version(Given("m", tiny), "1.0.0", dependencies=["base@1.a"])
    assert not (repository / ".dvc" / "cache").exists()


def test_references_mean_what_they_say(manager: ModelVersionManager, tiny: Checkpoint):
    for version in ("1.9.0", "1.10.0", "1.9.1", "2.0.0-rc.1", "0.1.0"):
        manager.register_version(Given("m", tiny), version)
    meant = {r: manager.resolve(r).version for r in ("m", "m@current", "m@latest", "m@1.x", "m@1.9.x", "m@v2.0.0-rc.1")}
    assert list(meant.values()) == ["1.10.0", "1.10.0", "1.10.0", "1.10.0", "1.9.1", "2.0.0-rc.1"]
    assert [v.version for v in manager.list_versions("m")] == ["0.1.0", "1.9.0", "1.9.1", "1.10.0", "2.0.0-rc.1"]
    assert [v.version for v in manager.list_versions("m") if v.current] == ["1.10.0"]
    with pytest.raises(VersionNotFoundError, match=r"m has no version 3\.x"):
        manager.resolve("m@3.x")


def test_models_whose_names_begin_alike_are_kept_apart(manager: ModelVersionManager, tiny: Checkpoint):
    for name in ("m", "m2", "m2x/m", "x/m"):
        manager.register_version(Given(name, tiny), "1.0.0")
    assert list(manager.list_models()) == ["m", "m2", "m2x/m", "x/m"]
    assert [v.name for v in manager.list_versions("m")] == ["m"]
    assert manager.get_version("m2x/m", "1.0.0").checkpoint.model_digest == tiny.model_digest
    with pytest.raises(
        VersionNotFoundError, match=r"no model n is registered in .*; registered there: m, m2, m2x/m, x/m"
    ):
        manager.resolve("n")


def test_tags_that_are_no_versions_disturb_nothing(manager: ModelVersionManager, repository: Path, tiny: Checkpoint):
    manager.register_version(Given("m", tiny), "1.0.0")
    for tag in ("v1.0", "m@v01.0.0", "m@v1.0.0-01", "m#prod#1", "release"):
        git(repository, "tag", tag)
    assert [v.reference for found in manager.list_models().values() for v in found] == ["m@v1.0.0"]


def test_a_home_of_its_own_is_made_by_a_registration_and_not_by_reading(tmp_path: Path, tiny: Checkpoint):
    manager, reader = ModelVersionManager(tmp_path / "home"), ModelVersionManager(tmp_path / "home")
    assert (manager.list_models(), manager.list_versions("m")) == ({}, [])
    with pytest.raises(VersionNotFoundError, match="no model m is registered in"):
        manager.resolve("m")
    with pytest.raises(InvalidVersionError):
        manager.register_version(Given("m", tiny), "1.0")
    assert not (tmp_path / "home").exists()
    manager.register_version(Given("m", tiny), "1.0.0")
    again = ModelVersionManager(tmp_path / "home")
    assert again.resolve("m").checkpoint.model_digest == tiny.model_digest
    assert reader.resolve("m") == again.resolve("m"), "made by another since"


def test_the_default_home_is_made_by_a_registration(tiny: Checkpoint):
    manager = ModelVersionManager()
    assert not manager.root.exists()
    manager.register_version(Given("m", tiny), "1.0.0")
    assert manager.root == Path.home() / ".proteus" / "versions"
    assert [v.reference for v in ModelVersionManager().list_versions("m")] == ["m@v1.0.0"]


def test_the_first_commit_of_a_repository_may_be_the_tags(tmp_path: Path, tiny: Checkpoint):
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".dvc").mkdir()
    version = ModelVersionManager(tmp_path).register_version(Given("m", tiny), "1.0.0")
    assert git(tmp_path, "rev-list", "--count", version.commit) == "1"
    assert version.checkpoint.model_digest == tiny.model_digest
