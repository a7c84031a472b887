"""Versions that `gto register` or a plain DVC user made: shown, read, verified, adopted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import git, make_checkpoint
from layouts import write_hf, write_official
from registering import Given, commit, flip

from proteus_pipeline.errors import IntegrityError, ModelError, StorageError, VersionConflictError
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry.versions import ModelVersionManager


def tool(root: Path, name: str, *args: str) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).with_name(name)), *args], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_gto(root: Path, path: str, *, version: str = "v1.0.0") -> None:
    """Track a file or folder with `dvc add`, name it in dvc.yaml, and `gto register` it as m."""
    tool(root, "dvc", "add", "--quiet", path)
    (root / "dvc.yaml").write_text(f"artifacts:\n  m:\n    path: {path}\n    type: model\n")
    git(root, "add", "--all")
    commit(root)
    for key, value in (("user.name", "A"), ("user.email", "a@example.org")):
        git(root, "config", key, value)
    tool(root, "gto", "register", "m", "--version", version, "--repo", str(root))


def table(root: Path) -> list[str]:
    """The versions of m in the table that `gto show` prints for people."""
    printed = tool(root, "gto", "show", "m", "--repo", str(root))
    cells = [cell.strip() for line in printed.splitlines() for cell in line.split("│")[2:3]]
    return [cell for cell in cells if cell.startswith("v1")]


@pytest.fixture
def manager(repository: Path) -> ModelVersionManager:
    return ModelVersionManager(repository)


@pytest.fixture(params=["folder", ".pt", "stage output"])
def registered(request: pytest.FixtureRequest, repository: Path, tiny: Checkpoint) -> str:
    """Weights as others track them, registered by gto, with the digest that they have."""
    (repository / "weights").mkdir()
    if request.param == ".pt":
        write_official(tiny, repository / "weights" / "tuned.pt", lm=False, contact=False)
        by_gto(repository, "weights/tuned.pt")
    elif request.param == "folder":
        write_hf(tiny, repository / "weights" / "hf", "safetensors", lm=False, contact=False)
        by_gto(repository, "weights/hf")
    else:
        write_hf(tiny, repository / "source", "bin", lm=False, contact=False)
        stage = "stages:\n  tune:\n    cmd: cp -r source weights/out\n    outs:\n    - weights/out\n"
        (repository / "dvc.yaml").write_text(stage + "artifacts:\n  m:\n    path: weights/out\n    type: model\n")
        tool(repository, "dvc", "repro", "--quiet")
        git(repository, "add", "dvc.yaml", "dvc.lock")
        commit(repository)
        git(repository, "config", "user.name", "A")
        git(repository, "config", "user.email", "a@example.org")
        tool(repository, "gto", "register", "m", "--version", "v1.0.0", "--repo", str(repository))
    return tiny.model_digest


def test_what_gto_registered_is_listed_read_verified_and_adopted(
    manager: ModelVersionManager, repository: Path, registered: str
):
    [version] = manager.list_versions("m")
    assert (version.record, version.current, version.checkpoint.model_digest) == (None, True, registered)
    assert manager.verify() == []
    oid = git(repository, "rev-parse", "m@v1.0.0")
    adopted = manager.adopt("m", "1.0.0", reason="ours from now on")
    assert adopted.record
    assert (adopted.record.model_digest, adopted.tag, adopted.commit) == (registered, "m@v1.0.0", version.commit)
    assert git(repository, "rev-parse", "m@v1.0.0") == oid, "the tag of others stays as it is"
    assert adopted.checkpoint.model_digest == registered
    assert [e.kind for e in manager.history("m").events] == ["registered", "adopted"]
    assert manager.verify() == []
    shown = json.loads(tool(repository, "gto", "show", "m", "--json", "--repo", str(repository)))
    assert [row["version"] for row in shown] == ["v1.0.0"]
    assert table(repository) == ["v1.0.0"]
    with pytest.raises(VersionConflictError, match="has a record already"):
        manager.adopt("m", "1.0.0")


def test_adopted_weights_are_checked_from_then_on(manager: ModelVersionManager, repository: Path, registered: str):
    manager.adopt("m", "1.0.0")
    files = manager.get_version("m", "1.0.0").files
    weights = max(files.values(), key=lambda p: p.stat().st_size)
    flip(weights, -200)
    with pytest.raises((IntegrityError, ModelError)) as caught:
        dict(manager.get_version("m", "1.0.0").checkpoint.tensors.items())
    assert caught.value.exit_code == 4
    assert {f.part for f in manager.verify()} == {"weights"}


def test_weights_that_are_no_model_are_not_adopted(manager: ModelVersionManager, repository: Path):
    (repository / "table.csv").write_text("a,b\n")
    by_gto(repository, "table.csv")
    assert [v.reference for v in manager.list_versions("m")] == ["m@v1.0.0"]
    with pytest.raises(ModelError):
        manager.adopt("m", "1.0.0")
    assert git(repository, "tag") == "m@v1.0.0"


def test_a_tag_of_nothing_that_dvc_tracks_is_named(manager: ModelVersionManager, repository: Path):
    git(repository, "tag", "m@v1.0.0")
    with pytest.raises(IntegrityError, match="names no artifact m that DVC tracks"):
        manager.adopt("m", "1.0.0")
    assert [f.part for f in manager.verify()] == ["pointer"]


def test_gto_and_dvc_agree_with_the_listing_through_every_event(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, tmp_path: Path
):
    for number in range(4):
        manager.register_version(Given("m", make_checkpoint(seed=number)), f"1.{number}.0")

    def agree(*, bytes_too: bool = False) -> None:
        ours = {v.version for v in manager.list_versions("m")}
        shown = json.loads(tool(repository, "gto", "show", "m", "--json", "--repo", str(repository)))
        assert {row["version"].removeprefix("v") for row in shown} == ours
        assert {number.removeprefix("v") for number in table(repository)} == ours
        for version in manager.list_versions("m") if bytes_too else ():
            out = tmp_path / "out"
            tool(repository, "dvc", "artifacts", "get", ".", "m", "--rev", f"v{version.version}", "-o", str(out))
            assert {p.name: p.read_bytes() for p in out.iterdir()} == {
                name: path.read_bytes() for name, path in version.files.items()
            }
            shutil.rmtree(out)
        history = tool(repository, "gto", "history", "m", "--json", "--repo", str(repository))
        events = {row["event"] for row in json.loads(history)}
        assert "registration" in events

    agree()
    manager.rollback("m", "1.1.0")
    agree()
    manager.delete_version("m", "1.0.0")
    agree()
    manager.restore_version("m", "1.0.0")
    agree(bytes_too=True)
    manager.delete_version("m", "1.0.0")
    manager.delete_version("m", "1.3.0")
    agree()
    shown = tool(repository, "gto", "show", "m#current", "--json", "--repo", str(repository))
    assert json.loads(shown)[0]["version"] == "v1.1.0"
    kinds = [
        row["event"] for row in json.loads(tool(repository, "gto", "history", "m", "--json", "--repo", str(repository)))
    ]
    assert kinds.count("deregistration") == 2, "the one that was restored since is gto's no longer"
    assert [e.kind for e in manager.history("m").events].count("deleted") == 3, "and is in our history all the same"
    assert manager.verify() == []


def test_a_version_that_gto_deregistered_is_not_live_and_can_be_restored(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    manager.register_version(Given("m", tiny), "1.0.0")
    manager.register_version(Given("m", make_checkpoint(seed=1)), "1.1.0")
    git(repository, "config", "user.name", "A")
    git(repository, "config", "user.email", "a@example.org")
    tool(repository, "gto", "deprecate", "m", "v1.0.0", "--repo", str(repository))
    assert [v.version for v in manager.list_versions("m")] == ["1.1.0"]
    assert manager.restore_version("m", "1.0.0").checkpoint.model_digest == tiny.model_digest
    assert [v.version for v in manager.list_versions("m")] == ["1.0.0", "1.1.0"]


def test_lost_weights_of_anothers_tag_say_so(manager: ModelVersionManager, repository: Path, tiny: Checkpoint):
    (repository / "weights").mkdir()
    write_official(tiny, repository / "weights" / "tuned.pt", lm=False, contact=False)
    by_gto(repository, "weights/tuned.pt")
    shutil.rmtree(repository / ".dvc" / "cache")
    with pytest.raises(StorageError, match="not in the DVC cache"):
        manager.adopt("m", "1.0.0")


def test_gto_s_taking_the_stage_away_leaves_the_greatest_release(manager: ModelVersionManager, repository: Path):
    for number in range(3):
        manager.register_version(Given("m", make_checkpoint(seed=number)), f"1.{number}.0")
    git(repository, "config", "user.name", "A")
    git(repository, "config", "user.email", "a@example.org")
    manager.rollback("m", "1.0.0")
    tool(repository, "gto", "assign", "m", "--version", "v1.1.0", "--stage", "current", "--repo", str(repository))
    assert manager.resolve("m").version == "1.1.0", "gto's own assignment, whose counter follows ours"
    tool(repository, "gto", "deprecate", "m", "v1.1.0", "current", "--repo", str(repository))
    assert manager.resolve("m").version == "1.2.0"
    assert manager.rollback("m", "1.0.0").current


def test_a_clone_that_fetched_a_deletion_and_then_its_restoration_counts_neither_twice(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, tmp_path: Path
):
    manager.register_version(Given("m", tiny), "1.0.0")
    manager.register_version(Given("m", make_checkpoint(seed=1)), "1.1.0")
    manager.delete_version("m", "1.0.0")
    git(tmp_path, "clone", "--quiet", str(repository), "clone")
    manager.restore_version("m", "1.0.0")
    git(tmp_path / "clone", "fetch", "--quiet", "--tags")
    there = ModelVersionManager(tmp_path / "clone")
    assert there.history("m").events == manager.history("m").events
    assert list(there.history("m").live) == ["1.0.0", "1.1.0"]


def test_two_clones_changes_do_not_collide(manager: ModelVersionManager, repository: Path, tmp_path: Path):
    for number in range(3):
        manager.register_version(Given("m", make_checkpoint(seed=number)), f"1.{number}.0")
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), "hub.git")
    git(repository, "remote", "add", "hub", str(tmp_path / "hub.git"))
    git(tmp_path, "clone", "--quiet", "hub.git", "other")
    other = ModelVersionManager(tmp_path / "other")
    git(tmp_path / "other", "config", "--file", ".dvc/config", "cache.dir", str(repository / ".dvc" / "cache"))
    manager.rollback("m", "1.0.0")
    other.rollback("m", "1.1.0")
    git(tmp_path / "other", "push", "--quiet", "--tags")
    git(repository, "push", "--quiet", "--tags", "hub")
    git(repository, "fetch", "--quiet", "--tags", "hub")
    git(tmp_path / "other", "fetch", "--quiet", "--tags")
    assert manager.history("m").events == other.history("m").events
    assert manager.resolve("m").version == other.resolve("m").version


def test_a_deletion_that_was_restored_elsewhere_is_no_removed_tag(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, tmp_path: Path
):
    for number in range(2):
        manager.register_version(Given("m", make_checkpoint(seed=number)), f"1.{number}.0")
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), "hub.git")
    git(repository, "remote", "add", "hub", str(tmp_path / "hub.git"))
    manager.delete_version("m", "1.0.0")
    git(repository, "push", "--quiet", "--tags", "hub")
    git(tmp_path, "clone", "--quiet", "hub.git", "other")
    other = ModelVersionManager(tmp_path / "other")
    git(tmp_path / "other", "config", "--file", ".dvc/config", "cache.dir", str(repository / ".dvc" / "cache"))
    shutil.copytree(repository / ".proteus" / "backups", tmp_path / "other" / ".proteus" / "backups")
    other.restore_version("m", "1.0.0")
    git(tmp_path / "other", "push", "--quiet", "--tags")
    git(repository, "fetch", "--quiet", "--tags", "hub")
    assert list(manager.history("m").live) == ["1.0.0", "1.1.0"]
    assert [f.what for f in manager.verify() if f.part == "tag"] == []
    (deletion,) = git(repository, "tag", "--list", "m@v1.0.0!*").splitlines()
    git(repository, "tag", "-d", deletion)
    assert [f.what for f in manager.verify() if f.part == "tag"] == []


def test_a_deletion_that_somebody_moved_is_not_swept_away_by_a_restoration(
    manager: ModelVersionManager, repository: Path
):
    for number in range(2):
        manager.register_version(Given("m", make_checkpoint(seed=number)), f"1.{number}.0")
    manager.delete_version("m", "1.0.0")
    (deletion,) = git(repository, "tag", "--list", "m@v1.0.0!*").splitlines()
    git(repository, "update-ref", f"refs/tags/{deletion}", git(repository, "rev-parse", "m@v1.1.0"))
    with pytest.raises(IntegrityError, match=r"was moved or edited; proteus model verify --repair"):
        manager.restore_version("m", "1.0.0")
    assert manager.verify(repair=True)
    assert manager.restore_version("m", "1.0.0").version == "1.0.0"
