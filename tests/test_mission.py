"""The users' own document: its usage runs as they wrote it, but for the import path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_checkpoint
from groups import Group
from layouts import write_official
from loopback import serving
from redis_server import redis_server

from proteus_pipeline.models import download

NAME = "esm2_t33_650M_UR50D"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user in no project, with an empty HOME, whose fair-esm address is a loopback server's."""
    official = write_official(make_checkpoint(), tmp_path / f"{NAME}.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "_BACKOFF_S", 0.005)
    with serving() as served:
        monkeypatch.setenv("PROTEUS_FAIR_ESM_URL", served.url("esm"))
        for folder, name in (("models", f"{NAME}.pt"), ("regression", f"{NAME}-contact-regression.pt")):
            served.files[f"esm/{folder}/{name}"] = official.with_name(name).read_bytes()
        yield tmp_path


def test_basic_version_control(outside: Path):
    from proteus_pipeline import ModelInterface, ModelVersionManager

    # Initialize version manager
    version_manager = ModelVersionManager()

    # Register model version
    model = ModelInterface(name="esm2_t33_650M_UR50D")
    version_manager.register_version(
        model=model,
        version="1.0.0",
        metadata={"training_data": "UR50D", "architecture": "transformer", "parameters": "650M"},
    )

    # Get specific version
    model_v1 = version_manager.get_version("esm2_t33_650M_UR50D", "1.0.0")

    assert (Path.home() / ".proteus" / "versions" / ".git").is_dir()
    assert model_v1.record
    assert model_v1.record.metadata == {"training_data": "UR50D", "architecture": "transformer", "parameters": "650M"}
    assert model_v1.checkpoint.model_digest == model.checkpoint.model_digest
    assert [v.version for v in version_manager.list_versions("esm2_t33_650M_UR50D")] == ["1.0.0"]

    bound = ModelInterface(name="esm2_t33_650M_UR50D", version_manager=ModelVersionManager())
    assert bound.version == model_v1
    (vector,) = bound.embed(["MKTAYIAKQRQISFVKSHFSRQ"])
    assert vector.shape == (32,)


def test_with_distributed_systems(outside: Path, group: Group, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROTEUS_S3_URL", group.url)
    monkeypatch.setenv("PROTEUS_GIT_REMOTE", str(group.hub))
    with redis_server(outside / "redis") as server:
        monkeypatch.setenv("PROTEUS_REDIS_URL", server.url)

        from proteus_pipeline import DistributedVersionManager

        dist_manager = DistributedVersionManager(storage_backend="s3", cache_backend="redis")

        from proteus_pipeline import ModelInterface

        model = ModelInterface(name="esm2_t33_650M_UR50D")
        dist_manager.register_version(model, "1.0.0", {"training_data": "UR50D"})
        monkeypatch.setenv("HOME", str(outside / "another"))
        there = DistributedVersionManager(storage_backend="s3", cache_backend="redis")
        assert there.root != dist_manager.root
        version = there.get_version("esm2_t33_650M_UR50D", "1.0.0")
        assert version.checkpoint.model_digest == model.checkpoint.model_digest
        (vector,) = ModelInterface("esm2_t33_650M_UR50D", there).embed(["MKTAYIAKQRQISFVKSHFSRQ"])
        assert vector.shape == (32,)
        # What the group has already is no conflict.
        assert there.register_version(ModelInterface("esm2_t33_650M_UR50D"), "1.0.0").oid == version.oid


def test_the_api_reference_and_the_options(outside: Path):
    from proteus_pipeline import ModelInterface, ModelVersionManager

    write_official(make_checkpoint(seed=1), outside / "tuned.pt")
    manager = ModelVersionManager(
        storage_path=outside / "versions", backup_enabled=True, max_versions=10, metadata_schema=None
    )
    first = manager.register_version(ModelInterface(NAME), "1.0.0", {"note": "official"})
    manager.register_version(ModelInterface(NAME, weights=outside / "tuned.pt"), "1.1.0", {"note": "tuned"})
    assert [v.version for v in manager.list_versions(NAME)] == ["1.0.0", "1.1.0"]
    assert manager.resolve(NAME).version == "1.1.0"
    assert manager.rollback(NAME, "1.0.0").current
    manager.delete_version(NAME, "1.1.0")
    assert [v.reference for v in manager.list_versions(NAME)] == [first.reference]
    metrics = manager.metrics()
    assert (metrics.registrations, metrics.rollbacks, metrics.deletions, metrics.conflicts) == (2, 1, 1, 0)
    assert metrics.backup_bytes > 0 < metrics.storage_bytes


def test_the_error_handlers(outside: Path):
    from proteus_pipeline import (
        InvalidVersionError,
        ModelInterface,
        ModelVersionManager,
        StorageError,
        VersionConflictError,
    )

    version_manager = ModelVersionManager()
    write_official(make_checkpoint(seed=1), outside / "other.pt")
    version_manager.register_version(ModelInterface(NAME), version="1.0.0")
    caught = []
    for model, version in (
        (ModelInterface(NAME, weights=outside / "other.pt"), "1.0.0"),
        (ModelInterface(NAME), "one"),
        (ModelInterface(NAME, weights=outside / "gone.pt"), "1.1.0"),
        (ModelInterface("esm2_t36_3B_UR50D"), "1.0.0"),
    ):
        try:
            version_manager.register_version(model, version=version)
        except VersionConflictError:
            caught.append("conflict")
        except InvalidVersionError:
            caught.append("invalid")
        except StorageError:
            caught.append("storage")
    assert caught == ["conflict", "invalid", "storage", "storage"]
    assert version_manager.metrics().conflicts == 1
