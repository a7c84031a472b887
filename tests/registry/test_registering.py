from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from conftest import git, make_checkpoint
from registering import Given, commit

from proteus_pipeline.errors import (
    CompatibilityError,
    ConfigError,
    MetadataError,
    StorageError,
    VersionConflictError,
    VersionNotFoundError,
)
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry.versions import ModelVersionManager


@pytest.fixture
def manager(repository: Path) -> ModelVersionManager:
    return ModelVersionManager(repository)


def noisy(checkpoint: Checkpoint, scale: float) -> Checkpoint:
    """The model with each weight matrix moved by a fraction of its size."""
    generator = torch.Generator().manual_seed(7)
    moved = {
        name: t + scale * t.abs().mean() * torch.randn(t.shape, generator=generator) if t.dim() == 2 else t
        for name, t in checkpoint.tensors.items()
    }
    return Checkpoint(checkpoint.architecture, moved)


def test_auto_takes_the_step_that_the_measured_drift_asks_for(manager: ModelVersionManager, tiny: Checkpoint):
    numbers = []
    for model in (tiny, noisy(tiny, 1e-6), noisy(tiny, 0.5), make_checkpoint(width=64), noisy(tiny, 0.0)):
        version = manager.register_version(Given("m", model), bump="auto", breaking="width")
        numbers.append(version.version)
    assert numbers == ["1.0.0", "1.0.1", "1.1.0", "2.0.0", "3.0.0"]
    told = [v.record.compatibility for v in manager.list_versions("m") if v.record]
    assert [t.get("level") for t in told] == [None, "patch", "minor", "major", "major"]
    assert [t.get("with") for t in told] == [None, "1.0.0", "1.0.1", "1.1.0", "2.0.0"]
    assert 0 < told[1]["drift"]["max_relative_l2"] < told[1]["tolerance"] < told[2]["drift"]["max_relative_l2"]


def test_a_bump_that_promises_more_than_the_drift_keeps_is_refused(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    manager.register_version(Given("m", tiny), "1.0.0")
    with pytest.raises(
        CompatibilityError, match=r"m v1\.0\.1 would follow v1\.0\.0, and asks for a MINOR step: .*moved"
    ):
        manager.register_version(Given("m", noisy(tiny, 0.5)), bump="patch")
    with pytest.raises(CompatibilityError, match="MAJOR"):
        manager.register_version(Given("m", make_checkpoint(layers=3)), bump="minor")
    assert git(repository, "tag") == "m@v1.0.0"
    assert manager.register_version(Given("m", noisy(tiny, 0.5)), bump="minor").version == "1.1.0"
    assert (
        manager.register_version(Given("m", make_checkpoint(layers=3)), bump="major", breaking="x").version == "2.0.0"
    )


def test_a_declared_tolerance_holds_for_the_versions_after_it(manager: ModelVersionManager, tiny: Checkpoint):
    manager.register_version(Given("m", tiny), "1.0.0", tolerance=0.5)
    assert manager.register_version(Given("m", noisy(tiny, 0.02)), "1.0.1").record
    with pytest.raises(CompatibilityError, match=r"more than the tolerance of 0\.5"):
        manager.register_version(Given("m", make_checkpoint(seed=1)), "1.0.2")
    with pytest.raises(CompatibilityError, match="more than the tolerance of 1e-09"):
        manager.register_version(Given("m", noisy(tiny, 0.01)), "1.0.2", tolerance=1e-9)
    assert manager.register_version(Given("m", make_checkpoint(seed=1)), "1.1.0").version == "1.1.0"


def test_without_a_tolerance_a_number_is_its_giver_s(manager: ModelVersionManager, tiny: Checkpoint):
    manager.register_version(Given("m", tiny), "1.0.0")
    manager.register_version(Given("m", noisy(tiny, 0.5)), bump="auto")
    version = manager.register_version(Given("m", make_checkpoint(seed=1)), "1.1.1")
    assert version.record
    assert version.record.compatibility == {}


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_that_is_none_is_refused(manager: ModelVersionManager, tiny: Checkpoint, tolerance: float):
    with pytest.raises(ConfigError, match="tolerance is"):
        manager.register_version(Given("m", tiny), "1.0.0", tolerance=tolerance)


def test_a_back_port_is_measured_against_what_it_follows(manager: ModelVersionManager, tiny: Checkpoint):
    manager.register_version(Given("m", tiny), "1.0.0", tolerance=0.004)
    manager.register_version(Given("m", make_checkpoint(seed=1)), "2.0.0", breaking="all")
    version = manager.register_version(Given("m", noisy(tiny, 1e-6)), "1.0.1")
    assert version.record
    assert version.record.compatibility["with"] == "1.0.0"
    assert manager.resolve("m").version == "2.0.0"


@pytest.mark.parametrize(("version", "bump"), [(None, None), ("1.0.0", "minor"), (None, "huge")])
def test_a_version_or_a_bump_and_one_of_them(
    manager: ModelVersionManager, tiny: Checkpoint, version: str | None, bump: str | None
):
    with pytest.raises(ConfigError, match="bump"):
        manager.register_version(Given("m", tiny), version, bump=bump)


def test_a_bump_counts_from_the_greatest_there_ever_was(manager: ModelVersionManager, tiny: Checkpoint):
    for number, seed in (("1.0.0", 0), ("1.4.0", 1)):
        manager.register_version(Given("m", make_checkpoint(seed=seed)), number)
    manager.rollback("m", "1.0.0")
    manager.delete_version("m", "1.4.0")
    assert manager.register_version(Given("m", make_checkpoint(seed=2)), bump="minor").version == "1.5.0"


def test_a_major_version_that_does_not_say_what_it_breaks_is_warned_of(
    manager: ModelVersionManager, tiny: Checkpoint, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        manager.register_version(Given("m", tiny), "1.0.0")
        manager.register_version(Given("m", make_checkpoint(seed=1)), "2.0.0", breaking="the alphabet")
        manager.register_version(Given("m", make_checkpoint(seed=2)), "2.1.0")
        assert not caplog.records
        manager.register_version(Given("m", make_checkpoint(seed=3)), "3.0.0")
    assert "m@v3.0.0 is a MAJOR version and does not say what it breaks" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        manager.register_version(Given("m", make_checkpoint(width=64)), "3.1.0")
    assert "m@v3.1.0 differs from v3.0.0 in width, which asks for a MAJOR version" in caplog.text
    record = manager.get_version("m", "2.0.0").record
    assert record
    assert record.breaking == "the alphabet"


def test_a_dependency_is_a_version_that_is_there_and_not_itself(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    manager.register_version(Given("base", tiny), "1.0.0")
    with pytest.raises(VersionNotFoundError, match="no model tokenizer is registered"):
        manager.register_version(Given("m", tiny), "1.0.0", dependencies=["base", "tokenizer"])
    with pytest.raises(VersionConflictError, match=r"m@v1\.0\.0 can't depend on itself"):
        manager.register_version(Given("m", tiny), "1.0.0", dependencies=["m@1.0.0"])
    with pytest.raises(ConfigError, match="one text"):
        manager.register_version(Given("m", tiny), "1.0.0", dependencies="base")
    assert git(repository, "tag") == "base@v1.0.0"
    version = manager.register_version(Given("m", tiny), "1.0.0", dependencies=["base", "base@1.x"])
    assert version.record
    assert version.record.dependencies == ("base@v1.0.0",)


def test_metadata_are_held_to_a_schema(repository: Path, tiny: Checkpoint):
    manager = ModelVersionManager(repository, metadata_schema="protein-model")
    with pytest.raises(MetadataError, match=r"metadata\.architecture is missing \(and 2 more\)"):
        manager.register_version(Given("m", tiny), "1.0.0")
    with pytest.raises(MetadataError, match=r"max_length"):
        manager.register_version(
            Given("m", tiny), "1.0.0",
            {"training_data": "UR50D", "architecture": "transformer", "parameters": "650M", "max_length": "long"},
        )  # fmt: skip
    assert git(repository, "tag") == ""
    good = {"training_data": "UR50D", "architecture": "transformer", "parameters": "650M"}
    assert manager.register_version(Given("m", tiny), "1.0.0", good).version == "1.0.0"
    with pytest.raises(ConfigError):
        ModelVersionManager(repository, metadata_schema="no such file.json")


def test_on_branch_the_branch_goes_along(manager: ModelVersionManager, repository: Path, tiny: Checkpoint):
    (repository / "staged").write_text("staged\n")
    git(repository, "add", "staged")
    with (repository / ".gitignore").open("a") as file:
        file.write("changed\n")
    head = git(repository, "rev-parse", "HEAD")
    version = manager.register_version(Given("lab/m", tiny), "1.0.0", on_branch=True)
    assert git(repository, "rev-parse", "HEAD") == version.commit == git(repository, "rev-parse", "main")
    assert git(repository, "rev-parse", "HEAD^") == head
    assert git(repository, "status", "--porcelain").splitlines() == ["M .gitignore", "A  staged"]
    assert (repository / "models" / "lab" / "m.dvc").read_text() == version.pointer.text()
    refs = git(repository, "for-each-ref")
    assert manager.register_version(Given("lab/m", tiny), "1.0.0", on_branch=True) == version
    assert git(repository, "for-each-ref") == refs


def test_a_registration_on_a_branch_that_was_cut_short_is_completed(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    version = manager.register_version(Given("m", tiny), "1.0.0", on_branch=True)
    # As after a kill between the refs and the index: the branch has moved, and nothing else.
    git(repository, "rm", "--quiet", "--cached", "models/m.dvc", "models/.gitignore", "dvc.yaml")
    for name in ("models/m.dvc", "models/.gitignore", "dvc.yaml"):
        (repository / name).unlink()
    assert manager.register_version(Given("m", tiny), "1.0.0", on_branch=True) == version
    assert git(repository, "status", "--porcelain") == ""
    # And between tag and branch, or where the tag was made without the branch.
    second = manager.register_version(Given("m", make_checkpoint(seed=1)), "1.1.0")
    assert git(repository, "rev-parse", "HEAD") == version.commit
    manager.register_version(Given("m", make_checkpoint(seed=1)), "1.1.0", on_branch=True)
    assert git(repository, "rev-parse", "HEAD") == second.commit
    assert git(repository, "status", "--porcelain") == ""
    assert (repository / "models" / "m.dvc").read_text() == second.pointer.text()


def test_a_branch_that_has_gone_elsewhere_is_left_alone(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    manager.register_version(Given("m", tiny), "1.0.0")
    head = commit(repository)
    with pytest.raises(StorageError, match="main has moved on since the tag was made; git merge"):
        manager.register_version(Given("m", tiny), "1.0.0", on_branch=True)
    assert git(repository, "rev-parse", "HEAD") == head


@pytest.mark.parametrize("how", ["staged", "unstaged", "untracked", "detached"])
def test_on_branch_refuses_what_it_would_overwrite(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, how: str
):
    (repository / "dvc.yaml").write_text("stages: {}\n")
    git(repository, "add", "dvc.yaml")
    commit(repository)
    if how == "detached":
        git(repository, "checkout", "--quiet", "--detach")
    elif how == "untracked":
        (repository / "models").mkdir()
        (repository / "models" / "m.dvc").write_text("mine\n")
    else:
        (repository / "dvc.yaml").write_text("stages: {}\nplots: []\n")
    if how == "staged":
        git(repository, "add", "dvc.yaml")
    before = (git(repository, "status", "--porcelain=v2"), git(repository, "for-each-ref"))
    with pytest.raises(StorageError, match=r"no branch is checked out|has changes that are not committed"):
        manager.register_version(Given("m", tiny), "1.0.0", on_branch=True)
    assert (git(repository, "status", "--porcelain=v2"), git(repository, "for-each-ref")) == before


def test_a_tag_that_a_hand_removed_is_put_back_for_the_same_weights_and_conflicts_with_others(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    manager.register_version(Given("m", tiny), "1.0.0")
    oid = git(repository, "rev-parse", "m@v1.0.0")
    git(repository, "tag", "-d", "m@v1.0.0")
    with pytest.raises(VersionConflictError, match="exists with other weights"):
        manager.register_version(Given("m", make_checkpoint(seed=1)), "1.0.0")
    git(repository, "tag", "-d", "m@v1.0.0")
    assert manager.register_version(Given("m", tiny), "1.0.0").oid == oid


def test_a_bump_of_the_same_weights_and_metadata_is_the_version_there_is(repository: Path, tiny: Checkpoint):
    manager = ModelVersionManager(repository)
    first = manager.register_version(Given("m", tiny), bump="minor", metadata={"a": "1"})
    for metadata in (None, {"a": "1"}):
        assert manager.register_version(Given("m", tiny), metadata=metadata, bump="minor").tag == first.tag
    assert manager.register_version(Given("m", tiny), metadata={"a": "2"}, bump="patch").version == "1.0.1"


@pytest.mark.parametrize(("first", "second"), [("lab", "lab/tiny"), ("lab/tiny", "lab"), ("a/b/c", "a")])
def test_a_model_s_folder_within_another_s_is_refused(repository: Path, tiny: Checkpoint, first: str, second: str):
    manager = ModelVersionManager(repository)
    manager.register_version(Given(first, tiny), "1.0.0")
    with pytest.raises(VersionConflictError, match="would hold the other"):
        manager.register_version(Given(second, tiny), "1.0.0")
    manager.register_version(Given("labx/tiny", tiny), "1.0.0")
