from __future__ import annotations

from pathlib import Path

import pytest
from conftest import git, make_checkpoint
from registering import Given, commit

from proteus_pipeline.errors import VersionConflictError
from proteus_pipeline.registry.versions import ModelVersionManager


@pytest.fixture
def manager(repository: Path) -> ModelVersionManager:
    manager = ModelVersionManager(repository)
    for number in range(4):
        manager.register_version(Given("lab/m", make_checkpoint(seed=number)), f"1.{number}.0")
    return manager


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    git(root, "add", "--all")


def needed(manager: ModelVersionManager, version: str = "1.0.0") -> str:
    return "; ".join(manager.plan_deletion("lab/m", version).needed)


LOCK = "schema: 1\nreferences:\n  lab/m@1.x:\n    version: 1.0.0\n    model: aa\n    trunk: bb\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("conf/config.yaml", "model: lab/m@v1.0.0\n"),
        ("conf/deep/er/x.yaml", "# lab/m@1.0.0, says a comment\n"),
        ("params.yaml", "candidate: 'lab/m@1.0.0'\n"),
        ("dvc.lock", "stages:\n  report:\n    params:\n      composed.yaml:\n        reference: lab/m@v1.0.0\n"),
        ("models.lock", LOCK),
    ],
)
def test_a_version_recorded_at_a_branch_or_a_tag_or_here_is_needed(
    manager: ModelVersionManager, repository: Path, name: str, text: str
):
    assert needed(manager) == ""
    write(repository, name, text)
    assert needed(manager) == f"it is recorded in {name} at the working tree"
    commit(repository)
    git(repository, "branch", "paper")
    git(repository, "rm", "--quiet", "-f", name)
    commit(repository)
    assert needed(manager) == f"it is recorded in {name} at paper"
    git(repository, "tag", "v1", "paper")
    git(repository, "branch", "-D", "paper")
    with pytest.raises(VersionConflictError, match=f"it is recorded in {name} at v1; roll back"):
        manager.delete_version("lab/m", "1.0.0")
    git(repository, "tag", "-d", "v1")
    assert manager.delete_version("lab/m", "1.0.0").needed == ()


@pytest.mark.parametrize(
    "text",
    [
        "model: lab/m@v1.0.01",
        "model: lab/m@v1.0.0-rc.1",
        "model: lab/m@v1.0.0+b",
        "model: other/lab/m@v1.0.0",
        "model: m@v1.0.0",
        "model: lab/m@1.x",
        "model: xlab/m@v1.0.0",
    ],
)
def test_what_only_looks_like_it_is_none_of_it(manager: ModelVersionManager, repository: Path, text: str):
    write(repository, "conf/config.yaml", text + "\n")
    commit(repository)
    assert needed(manager) == ""


def test_the_version_s_own_tag_does_not_keep_it(manager: ModelVersionManager, repository: Path):
    """Its commit is HEAD's child: it holds whatever conf/ said when it was registered."""
    write(repository, "conf/config.yaml", "model: lab/m@v1.5.0\n")
    commit(repository)
    manager.register_version(Given("lab/m", make_checkpoint(seed=8)), "1.5.0")
    write(repository, "conf/config.yaml", "model: lab/m@v1.3.0\n")
    commit(repository)
    manager.rollback("lab/m", "1.2.0")
    assert needed(manager, "1.5.0") == ""
    places = needed(manager, "1.3.0").removeprefix("it is recorded in ").split(", ")
    assert places == ["conf/config.yaml at main", "conf/config.yaml at the working tree"]


def test_a_stage_that_takes_the_weights_folder_needs_it(manager: ModelVersionManager, repository: Path):
    md5 = manager.get_version("lab/m", "1.0.0").pointer.md5
    deps = f"stages:\n  tune:\n    deps:\n    - path: models/lab/m\n      hash: md5\n      md5: {md5}\n"
    write(repository, "dvc.lock", deps)
    commit(repository)
    assert needed(manager).startswith("it is recorded in dvc.lock at main")


def test_many_places_are_counted(manager: ModelVersionManager, repository: Path):
    write(repository, "params.yaml", "model: lab/m@v1.0.0\n")
    commit(repository)
    for number in range(6):
        git(repository, "branch", f"b{number}")
    assert needed(manager).endswith(" more")


def test_files_of_any_bytes_hide_nothing_and_break_nothing(manager: ModelVersionManager, repository: Path):
    (repository / "conf").mkdir()
    (repository / "conf" / "odd.yaml").write_bytes(b"\xff\xfe\x00 lab/m@v1.0.0 \x00")
    write(repository, "models.lock", "references: [1, 2\n")
    commit(repository)
    assert "conf/odd.yaml at main" in needed(manager)
