from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import git, make_checkpoint
from registering import Given

from proteus_pipeline.errors import IntegrityError, StorageError, VersionConflictError, VersionNotFoundError
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.models.sources import FileSource, ModelEntry
from proteus_pipeline.registry.provision import provide
from proteus_pipeline.registry.supply import send
from proteus_pipeline.registry.versions import ModelVersion, ModelVersionManager
from proteus_pipeline.registry.weights import DvcCache

M1 = "m@v1.0.0"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Checkpoint) -> dict[str, Path]:
    """Two models as Hugging Face folders."""
    base = tmp_path_factory.mktemp("sources")
    write_folder(tiny, base / "tiny")
    write_folder(make_checkpoint(seed=1), base / "other")
    return {"tiny": base / "tiny", "other": base / "other"}


@pytest.fixture
def manager(repository: Path) -> ModelVersionManager:
    return ModelVersionManager(repository)


def entry(*folders: Path, description: str = "a small model") -> dict[str, ModelEntry]:
    """A catalogue of one model, whose versions 1.0.0, 1.0.1, ... come from these folders."""
    versions = {f"1.0.{i}": FileSource(folder) for i, folder in enumerate(folders)}
    return {"m": ModelEntry("m", description, "MIT", dict(versions), Path("conf/model/m.yaml"))}


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "x")


def commit_pointer(manager: ModelVersionManager, checkpoint: Checkpoint) -> None:
    pointer, _ = manager.store_weights("m", checkpoint)
    (manager.root / "models").mkdir(exist_ok=True)
    (manager.root / "models" / "m.dvc").write_text(pointer.text())
    (manager.root / "models" / ".gitignore").write_text("/m\n")
    (manager.root / "dvc.yaml").write_text("artifacts:\n  m:\n    path: models/m\n")
    commit(manager.root)


def lose_weights(manager: ModelVersionManager) -> None:
    shutil.rmtree(manager.root / ".dvc" / "cache")


def damage(version: ModelVersion) -> Path:
    files = DvcCache(version.root).files(version.pointer)
    assert files is not None
    path = files["model-layer-0.safetensors"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)
    return path


@pytest.mark.parametrize("reference", ["nobody@v1.0.0", "m@v9.0.0", "m", "m@1.x"])
def test_what_neither_registry_nor_catalogue_has_is_not_found(
    manager: ModelVersionManager, folders: dict[str, Path], reference: str
):
    with pytest.raises(VersionNotFoundError):
        provide(manager, reference, entry(folders["tiny"]))
    assert git(manager.root, "tag") == ""


def test_a_version_of_the_catalogue_is_fetched_tagged_and_readable(
    manager: ModelVersionManager, folders: dict[str, Path], tiny: Checkpoint
):
    version = provide(manager, M1, entry(folders["tiny"]))
    assert version.checkpoint.model_digest == tiny.model_digest
    assert version.record
    assert version.record.metadata == {"description": "a small model", "licence": "MIT"}
    assert version.record.source["origin"] == folders["tiny"].name
    assert set(version.record.source["sha256"]) >= {"config.json", "model-layer-0.safetensors"}
    refs = git(manager.root, "for-each-ref")
    assert provide(manager, M1, {}) == version
    assert provide(manager, "m", entry(folders["tiny"], description="reworded")) == version
    assert git(manager.root, "for-each-ref") == refs
    assert git(manager.root, "status", "--porcelain") == ""


def test_the_tag_is_at_head_and_the_folder_is_written_where_the_tree_asks_for_it(
    manager: ModelVersionManager, folders: dict[str, Path], tiny: Checkpoint
):
    commit_pointer(manager, tiny)
    lose_weights(manager)
    version = provide(manager, M1, entry(folders["tiny"]))
    assert version.commit == git(manager.root, "rev-parse", "HEAD")
    written = {p.name: p.read_bytes() for p in (manager.root / "models" / "m").iterdir()}
    assert written == {p.name: p.read_bytes() for p in folders["tiny"].iterdir()}
    assert git(manager.root, "status", "--porcelain") == ""


def test_a_source_that_gives_other_weights_than_the_committed_pointer_leaves_no_tag(
    manager: ModelVersionManager, folders: dict[str, Path], tiny: Checkpoint
):
    commit_pointer(manager, tiny)
    refs = git(manager.root, "for-each-ref")
    with pytest.raises(IntegrityError, match=r"are not those models/m\.dvc points to") as caught:
        provide(manager, M1, entry(folders["other"]))
    assert "\n" not in str(caught.value)
    assert git(manager.root, "for-each-ref") == refs
    assert not (manager.root / "models" / "m").exists()


def test_where_the_catalogue_has_several_versions_the_pointer_is_of_one_of_them(
    manager: ModelVersionManager, folders: dict[str, Path], tiny: Checkpoint
):
    commit_pointer(manager, tiny)
    catalogue = entry(folders["tiny"], folders["other"])
    assert provide(manager, "m@v1.0.1", catalogue).checkpoint.model_digest != tiny.model_digest
    assert not (manager.root / "models" / "m").exists()
    assert provide(manager, M1, catalogue).checkpoint.model_digest == tiny.model_digest
    assert (manager.root / "models" / "m").is_dir()


def test_the_last_version_of_the_catalogue_must_be_the_one_the_pointer_is_of(
    manager: ModelVersionManager, folders: dict[str, Path], tiny: Checkpoint
):
    commit_pointer(manager, tiny)
    catalogue = entry(folders["other"], folders["other"])
    provide(manager, "m@v1.0.1", catalogue)
    refs = git(manager.root, "for-each-ref")
    with pytest.raises(IntegrityError, match=r"are not those models/m\.dvc points to"):
        provide(manager, M1, catalogue)
    assert git(manager.root, "for-each-ref") == refs
    assert provide(manager, M1, entry(folders["tiny"], folders["other"])).checkpoint.digests == tiny.digests


def test_the_pointer_of_a_registered_version_is_no_other_versions(
    manager: ModelVersionManager, folders: dict[str, Path], tiny: Checkpoint
):
    commit_pointer(manager, tiny)
    git(manager.root, "tag", "m@v2.0.0")
    assert provide(manager, M1, entry(folders["other"])).checkpoint.model_digest != tiny.model_digest


def test_a_fetch_makes_a_home(tmp_path: Path, folders: dict[str, Path], tiny: Checkpoint):
    manager = ModelVersionManager(tmp_path / "home")
    with pytest.raises(VersionNotFoundError):
        provide(manager, "m@v9.0.0", entry(folders["tiny"]))
    assert not (tmp_path / "home").exists()
    assert provide(manager, M1, entry(folders["tiny"])).checkpoint.model_digest == tiny.model_digest


def test_lost_weights_come_back_from_their_source(
    manager: ModelVersionManager, folders: dict[str, Path], tiny: Checkpoint
):
    provide(manager, M1, entry(folders["tiny"]))
    lose_weights(manager)
    assert provide(manager, M1, entry(folders["tiny"])).checkpoint.model_digest == tiny.model_digest


def test_lost_weights_do_not_come_back_from_a_source_that_gives_others(
    manager: ModelVersionManager, folders: dict[str, Path]
):
    version = provide(manager, M1, entry(folders["tiny"]))
    lose_weights(manager)
    with pytest.raises(IntegrityError, match=r"no longer gives the weights of m@v1\.0\.0"):
        provide(manager, M1, entry(folders["other"]))
    assert DvcCache(manager.root).files(version.pointer) is None


def test_lost_weights_of_a_tag_without_a_record_come_back_by_their_pointer(
    manager: ModelVersionManager, folders: dict[str, Path], tiny: Checkpoint
):
    commit_pointer(manager, tiny)
    git(manager.root, "tag", M1)
    lose_weights(manager)
    with pytest.raises(IntegrityError, match=r"does not give the weights of m@v1\.0\.0"):
        provide(manager, M1, entry(folders["other"]))
    assert provide(manager, M1, entry(folders["tiny"])).checkpoint.model_digest == tiny.model_digest


def test_lost_weights_without_a_source_say_what_to_do(manager: ModelVersionManager, folders: dict[str, Path]):
    provide(manager, M1, entry(folders["tiny"]))
    lose_weights(manager)
    with pytest.raises(StorageError, match=r"not in the DVC cache, and not in backups"):
        provide(manager, M1, {})


def test_force_mends_damaged_weights_from_the_source(
    manager: ModelVersionManager, folders: dict[str, Path], tiny: Checkpoint
):
    path = damage(provide(manager, M1, entry(folders["tiny"])))
    with pytest.raises(IntegrityError, match="is damaged"):
        dict(provide(manager, M1, entry(folders["tiny"])).checkpoint.tensors.items())
    mended = provide(manager, M1, entry(folders["tiny"]), force=True)
    assert mended.checkpoint.model_digest == tiny.model_digest
    assert path.stat().st_mode & 0o777 == 0o444
    listing = DvcCache(manager.root).object(mended.pointer.md5)
    listing.chmod(0o644)
    listing.write_bytes(b"[]")
    assert provide(manager, M1, entry(folders["tiny"]), force=True).checkpoint.model_digest == tiny.model_digest


def test_force_without_a_source_finds_damage(manager: ModelVersionManager, folders: dict[str, Path]):
    version = provide(manager, M1, entry(folders["tiny"]))
    assert provide(manager, M1, {}, force=True) == version
    damage(version)
    with pytest.raises(IntegrityError, match="are damaged"):
        provide(manager, M1, {}, force=True)


def test_a_deleted_version_is_not_provided_again(manager: ModelVersionManager, folders: dict[str, Path]):
    provide(manager, M1, entry(folders["tiny"]))
    git(manager.root, "tag", f"{M1}!", f"{M1}^{{commit}}")
    with pytest.raises(VersionConflictError, match="was deleted"):
        provide(manager, M1, entry(folders["tiny"]))


@pytest.fixture
def clones(repository: Path, tmp_path: Path) -> tuple[ModelVersionManager, ModelVersionManager]:
    """Two clones of one repository."""
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), "hub.git")
    for name in ("one", "two"):
        git(tmp_path, "clone", "--quiet", "hub.git", name)
        # Two authors: two tags made in one second by one author would be the same object by chance.
        git(tmp_path / name, "config", "user.name", name)
        git(tmp_path / name, "config", "user.email", f"{name}@example.org")
    return ModelVersionManager(tmp_path / "one"), ModelVersionManager(tmp_path / "two")


def test_a_remotes_tag_of_the_same_weights_is_taken_over(
    clones: tuple[ModelVersionManager, ModelVersionManager], folders: dict[str, Path], tiny: Checkpoint
):
    one, two = clones
    provide(one, M1, entry(folders["tiny"]))
    git(one.root, "push", "--quiet", "origin", M1)
    version = provide(two, M1, entry(folders["tiny"], description="reworded since"))
    assert git(two.root, "rev-parse", M1) == git(one.root, "rev-parse", M1)
    assert version.checkpoint.model_digest == tiny.model_digest
    assert git(two.root, "for-each-ref", "--format=%(refname)", "refs/proteus") == f"refs/proteus/ledger/{M1}"


@pytest.mark.parametrize("how", ["other weights", "no record"])
def test_a_remotes_tag_of_other_weights_is_a_conflict(
    clones: tuple[ModelVersionManager, ModelVersionManager], folders: dict[str, Path], how: str
):
    one, two = clones
    if how == "no record":
        git(one.root, "tag", M1)
    else:
        provide(one, M1, entry(folders["other"]))
    git(one.root, "push", "--quiet", "origin", M1)
    refs = git(two.root, "for-each-ref")
    with pytest.raises(VersionConflictError, match=r"m@v1\.0\.0 on origin has other weights"):
        provide(two, M1, entry(folders["tiny"]))
    assert git(two.root, "for-each-ref") == refs


def test_a_remotes_damaged_record_is_an_error_that_leaves_nothing(
    clones: tuple[ModelVersionManager, ModelVersionManager], folders: dict[str, Path]
):
    one, two = clones
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    git(one.root, *who, "tag", "-a", "-m", "T\n\nproteus-record: 1\n{", M1)
    git(one.root, "push", "--quiet", "origin", M1)
    refs = git(two.root, "for-each-ref")
    with pytest.raises(IntegrityError, match="was edited or damaged"):
        provide(two, M1, entry(folders["tiny"]))
    assert git(two.root, "for-each-ref") == refs


def test_a_remote_that_cant_be_reached_or_lacks_the_tag_does_not_matter(
    clones: tuple[ModelVersionManager, ModelVersionManager], folders: dict[str, Path]
):
    one, two = clones
    provide(one, M1, entry(folders["tiny"]))
    git(one.root, "push", "--quiet", "origin", M1)
    git(two.root, "remote", "rename", "origin", "zz")  # remotes are asked in the order of their names
    git(two.root, "remote", "add", "gone", "/nowhere/at/all.git")
    git(two.root, "remote", "add", "refused", "http://127.0.0.1:1/x.git")
    provide(two, M1, entry(folders["tiny"]))
    assert git(two.root, "rev-parse", M1) == git(one.root, "rev-parse", M1)
    git(two.root, "tag", "-d", M1)
    git(two.root, "remote", "remove", "zz")
    assert provide(two, M1, entry(folders["tiny"])).tag == M1


def test_a_version_that_only_a_git_remote_has_comes_with_its_events(
    clones: tuple[ModelVersionManager, ModelVersionManager], folders: dict[str, Path], tiny: Checkpoint, tmp_path: Path
):
    one, two = clones
    for clone in clones:
        git(clone.root, "config", "--file", ".dvc/config", "remote.shared.url", "x")
        text = f"[core]\n    remote = shared\n['remote \"shared\"']\n    url = {tmp_path / 'remote'}\n"
        (clone.root / ".dvc" / "config").write_text(text)
    provide(one, M1, entry(folders["tiny"]))
    one.register_version(Given("m", make_checkpoint(seed=5)), "1.1.0")
    one.rollback("m", "1.0.0")
    for number in ("1.0.0", "1.1.0"):
        version = one.get_version("m", number)
        send(one.root, version.pointer, version.reference)
    git(one.root, "push", "--quiet", "--tags", "origin")
    assert provide(two, "m", {}).checkpoint.model_digest == tiny.model_digest
    assert [e.tag for e in two.history("m").events] == [e.tag for e in one.history("m").events]
    assert provide(two, "m@v1.1.0", {}).version == "1.1.0"
    with pytest.raises(VersionNotFoundError):
        provide(two, "m@v9.0.0", {})


def test_a_git_remote_that_cant_be_asked_is_named(repository: Path, manager: ModelVersionManager, tmp_path: Path):
    git(repository, "remote", "add", "origin", str(tmp_path / "nowhere"))
    with pytest.raises(VersionNotFoundError, match=r"could not be fetched from origin: .*look at git remote -v"):
        provide(manager, "m@v1.0.0", {})
