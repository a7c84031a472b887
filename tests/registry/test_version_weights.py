"""A version's weights: as gto and dvc see them, and when somebody or something has changed them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import git, make_checkpoint
from registering import Given, commit

from proteus_pipeline.errors import IntegrityError, StorageError, VersionConflictError
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry.versions import ModelVersionManager
from proteus_pipeline.registry.weights import DvcCache


@pytest.fixture(scope="module")
def other() -> Checkpoint:
    return make_checkpoint(seed=1)


@pytest.fixture
def manager(repository: Path) -> ModelVersionManager:
    return ModelVersionManager(repository)


def command(root: Path, name: str, *args: str) -> str:
    """Run gto or dvc, as a user in the repository does."""
    tool = Path(sys.executable).with_name(name)
    done = subprocess.run([str(tool), *args], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["esm2_tiny", "lab/123"])
def test_gto_and_dvc_work_on_our_tags_and_give_the_same_bytes(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, tmp_path: Path, name: str
):
    version = manager.register_version(Given(name, tiny), "1.0.0")
    files = DvcCache(repository).files(version.pointer)
    assert files is not None
    command(repository, "dvc", "artifacts", "get", ".", name, "--rev", "v1.0.0", "-o", str(tmp_path / "out"))
    got = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert got == {file: path.read_bytes() for file, path in files.items()}
    if name != "esm2_tiny":
        return
    assert "v1.0.0" in command(repository, "gto", "show", name, "--repo", str(repository))
    git(repository, "checkout", "--quiet", "esm2_tiny@v1.0.0")
    command(repository, "dvc", "checkout")
    assert {p.name: p.read_bytes() for p in (repository / "models" / name).iterdir()} == got
    assert git(repository, "status", "--porcelain", "--", ".", ":!.dvc") == ""


def test_a_version_that_gto_registered_is_listed_and_read(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, other: Checkpoint
):
    pointer, _ = manager.store_weights("m", tiny)
    (repository / "models").mkdir()
    (repository / "models" / "m.dvc").write_text(pointer.text())
    git(repository, "add", ".")
    commit(repository)
    for key, value in (("user.name", "A"), ("user.email", "a@example.org")):
        git(repository, "config", key, value)
    command(repository, "gto", "register", "m", "--version", "v1.0.0", "--repo", str(repository))
    [version] = manager.list_versions("m")
    assert (version.reference, version.record, version.current) == ("m@v1.0.0", None, True)
    assert version.checkpoint.model_digest == tiny.model_digest
    assert manager.register_version(Given("m", tiny), "1.0.0") == version
    with pytest.raises(VersionConflictError, match=other.model_digest):
        manager.register_version(Given("m", other), "1.0.0")
    second = manager.register_version(Given("m", other), "1.1.0")
    assert second.record
    assert (second.record.parent, second.current) == ("1.0.0", True)


def test_weights_that_are_not_in_the_cache_say_how_to_get_them(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    version = manager.register_version(Given("m", tiny), "1.0.0")
    DvcCache(repository).object(version.pointer.md5).unlink()
    with pytest.raises(StorageError, match=r"not in the DVC cache, and not in backups; dvc remote add"):
        manager.get_version("m", "1.0.0").checkpoint  # noqa: B018


def reading_error(manager: ModelVersionManager) -> IntegrityError | None:
    """Read m@v1.0.0; bytes that say nothing of its tensors (padding, a title) may be other ones."""
    known = manager.get_version("m", "1.0.0")
    try:
        read = known.checkpoint
        for name in read.tensors:
            read.tensors[name]  # each is checked when it is touched
    except IntegrityError as error:
        return error
    assert known.record
    assert read.digests == known.record.components
    computed = Checkpoint(read.architecture, dict(read.tensors.items()))
    assert computed.digests == known.record.components
    return None


def test_a_flipped_bit_anywhere_in_the_weights_is_found_before_they_are_used(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    """Objects keep the mode 0444, by which DVC itself trusts them unread."""
    version = manager.register_version(Given("m", tiny), "1.0.0")
    files = DvcCache(repository).files(version.pointer)
    assert files is not None
    found = 0
    for path in files.values():
        whole = path.read_bytes()
        size = len(whole)
        for place in {0, 3, 9, 40, size // 3, size // 2, size - 1} & set(range(size)):
            for bit in (0x01, 0x80):
                data = bytearray(whole)
                data[place] ^= bit
                path.chmod(0o644)
                path.write_bytes(data)
                path.chmod(0o444)
                error = reading_error(manager)
                found += error is not None
                assert error is None or "proteus model verify" in error.remedy
        path.chmod(0o644)
        path.write_bytes(whole)
        path.chmod(0o444)
    assert found > 60
    assert manager.get_version("m", "1.0.0").checkpoint.digests == tiny.digests


def test_every_single_bit_of_a_tensor_counts(manager: ModelVersionManager, repository: Path, tiny: Checkpoint):
    version = manager.register_version(Given("m", tiny), "1.0.0")
    files = DvcCache(repository).files(version.pointer)
    assert files is not None
    path = files["model-layer-1.safetensors"]
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)
    tensors = manager.get_version("m", "1.0.0").checkpoint.tensors
    with pytest.raises(IntegrityError, match=r"m@v1\.0\.0 in the DVC cache is damaged \(esm\.encoder\.layer\.1\."):
        dict(tensors.items())


def move_tag(root: Path, target: str) -> None:
    """Give the tag m@v1.0.0 another commit and its own message, as somebody who tampers would."""
    message = git(root, "for-each-ref", "--format=%(contents)", "refs/tags/m@v1.0.0")
    who = ("-c", "user.name=X", "-c", "user.email=x@example.org")
    git(root, *who, "tag", "-f", "-a", "--cleanup=verbatim", "-m", message + "\n", "m@v1.0.0", target)


def test_a_pointer_that_is_not_the_records_is_refused(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, other: Checkpoint
):
    manager.register_version(Given("m", tiny), "1.0.0")
    elsewhere = manager.register_version(Given("m", other), "1.1.0")
    move_tag(repository, elsewhere.commit)
    version = manager.get_version("m", "1.0.0")
    assert version.record
    with pytest.raises(IntegrityError, match=r"tag m@v1\.0\.0 was moved or edited: it is \w+ now, and was \w+ when"):
        version.checkpoint  # noqa: B018
    # Where the ledger has no entry, as in a fresh clone, the record and the commit are all there is.
    git(repository, "update-ref", "-d", "refs/proteus/ledger/m@v1.0.0")
    with pytest.raises(IntegrityError, match=r"tag m@v1\.0\.0 points to weights \w+\.dir, and its record says"):
        manager.get_version("m", "1.0.0").checkpoint  # noqa: B018
    move_tag(repository, "HEAD")
    with pytest.raises(IntegrityError, match=r"commit \w+ has no models/m\.dvc"):
        manager.get_version("m", "1.0.0").pointer  # noqa: B018


def test_a_record_of_another_version_is_refused(manager: ModelVersionManager, repository: Path, tiny: Checkpoint):
    manager.register_version(Given("m", tiny), "1.0.0")
    git(repository, "update-ref", "refs/tags/m@v2.0.0", git(repository, "rev-parse", "m@v1.0.0"))
    with pytest.raises(IntegrityError, match=r"tag m@v2\.0\.0 is of m@v1\.0\.0"):
        manager.get_version("m", "2.0.0")
