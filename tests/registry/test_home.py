from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import git

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.home import open_home
from proteus_pipeline.registry.places import project_root, registry_home


def test_the_project_is_the_folder_with_git_and_dvc(repository: Path):
    below = repository / "a" / "b"
    below.mkdir(parents=True)
    assert project_root(below) == repository
    (below / ".dvc").mkdir()
    assert project_root(below) == repository, "a .dvc alone is no project"


def test_outside_there_is_none(tmp_path: Path):
    assert project_root(tmp_path) is None


def test_dvc_root_comes_first(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_ROOT", str(repository))
    assert project_root(tmp_path) == repository


def test_the_registry_is_as_given_else_the_project_else_proteus_home_else_the_home(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path / "mine"))
    assert registry_home("~/given") == Path.home() / "given"
    assert registry_home() == repository
    monkeypatch.chdir(tmp_path)
    assert registry_home() == tmp_path / "mine"
    monkeypatch.delenv("PROTEUS_HOME")
    assert registry_home() == Path.home() / ".proteus" / "versions"


def test_a_home_is_made_once_clean_and_by_the_fallback_author(tmp_path: Path):
    home = tmp_path / "new" / "home"
    assert open_home(home).root == home
    head = git(home, "rev-parse", "HEAD")
    assert git(home, "status", "--porcelain") == ""
    assert git(home, "log", "--format=%an %ae") == "proteus proteus@localhost"
    assert open_home(home).root == home
    assert git(home, "rev-parse", "HEAD") == head
    for ignored in (".proteus/x", ".dvc/cache/x", ".dvc/tmp/x"):
        (home / ignored).parent.mkdir(parents=True, exist_ok=True)
        (home / ignored).touch()
    assert git(home, "status", "--porcelain") == ""


def test_a_home_below_a_projects_top_is_the_project(repository: Path):
    (repository / "sub").mkdir()
    (repository / "sub" / "file").touch()
    assert open_home(repository / "sub").root == repository


def test_a_file_is_no_home(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is a file; name a folder"):
        open_home(tmp_path / "file")
    with pytest.raises(StorageError, match="can't be created"):
        open_home(tmp_path / "file" / "below")


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(StorageError, match="not in a git repository"):
        open_home(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_repository_without_dvc_is_no_home(tmp_path: Path):
    git(tmp_path, "init", "--quiet")
    with pytest.raises(StorageError, match=r"without DVC; run dvc init"):
        open_home(tmp_path)


def test_homes_that_killed_processes_left_half_made_go(tmp_path: Path):
    left, young = tmp_path / f".home-{'a' * 16}", tmp_path / f".home-{'b' * 16}"
    (left / ".git").mkdir(parents=True)
    young.mkdir()
    os.utime(left, (1, 1))
    open_home(tmp_path / "home")
    assert (left.exists(), young.exists()) == (False, True)
