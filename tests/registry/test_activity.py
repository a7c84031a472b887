from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from conftest import make_checkpoint
from registering import Given, objects

from proteus_pipeline.errors import VersionConflictError
from proteus_pipeline.registry.activity import CONFLICTS, count_event
from proteus_pipeline.registry.versions import ModelVersionManager


def test_a_registry_counts_what_happened_in_whatever_process(repository: Path):
    manager = ModelVersionManager(repository)
    empty = manager.metrics()
    assert (empty.models, empty.registrations, empty.seconds_since_update) == (0, 0, None)
    for name, number in (("m", 0), ("m", 1), ("n", 0)):
        manager.register_version(Given(name, make_checkpoint(seed=number)), f"1.{number}.0")
    with pytest.raises(VersionConflictError):
        manager.register_version(Given("m", make_checkpoint(seed=5)), "1.0.0")
    manager.rollback("m", "1.0.0")
    manager.delete_version("m", "1.1.0")
    manager.restore_version("m", "1.1.0")
    manager.delete_version("m", "1.1.0")
    with pytest.raises(VersionConflictError):
        manager.register_version(Given("m", make_checkpoint(seed=1)), "1.1.0")
    found = ModelVersionManager(repository).metrics()
    assert (found.models, found.versions, found.registrations, found.rollbacks) == (2, 2, 3, 1)
    assert (found.deletions, found.restorations, found.conflicts, found.updates_per_30_days) == (2, 1, 2, 3)
    assert found.storage_bytes == sum(map(len, objects(repository).values())), "m@v1.0.0 and n@v1.0.0 share all"
    assert found.backup_bytes > 0
    assert found.seconds_since_update is not None
    assert 0 <= found.seconds_since_update < 600


def count(root: Path) -> None:
    for _ in range(50):
        count_event(root, CONFLICTS)


def test_counts_of_several_processes_add_up(repository: Path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=count, args=(repository,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert ModelVersionManager(repository).metrics().conflicts == 200


def test_a_count_that_cant_be_written_is_lost_and_nothing_else(repository: Path):
    (repository / ".proteus").mkdir()
    (repository / ".proteus" / "metrics").touch()
    count_event(repository, CONFLICTS)
    assert ModelVersionManager(repository).metrics().conflicts == 0
