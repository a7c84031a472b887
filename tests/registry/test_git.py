from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import git

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.git import FALLBACK_EMAIL, Git, GitError
from proteus_pipeline.registry.refs import publish


def test_the_repository_is_found_from_a_folder_below(repository: Path):
    below = repository / "a" / "b"
    below.mkdir(parents=True)
    assert Git.find(below).root == repository


def test_a_folder_outside_git_says_what_to_do(tmp_path: Path):
    with pytest.raises(StorageError, match=r"is not in a git repository; run git init"):
        Git.find(tmp_path)


def test_a_folder_that_is_gone_is_named(tmp_path: Path):
    with pytest.raises(StorageError, match="nowhere"):
        Git.find(tmp_path / "nowhere")


def test_git_that_is_not_installed_is_said(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StorageError, match="git is not installed"):
        Git(repository).run("status")


def test_a_command_that_takes_too_long_is_stopped(repository: Path):
    git(repository, "config", "alias.doze", "!sleep 20")
    with pytest.raises(GitError, match=r"git doze took over 0\.2 s"):
        Git(repository).run("doze", timeout_s=0.2)


def test_an_error_holds_what_went_wrong_and_not_gits_advice(repository: Path):
    (repository / ".git" / "refs" / "tags" / "m@v1.0.0.lock").touch()
    with pytest.raises(GitError, match="cannot lock ref") as caught:
        Git(repository).run("tag", "m@v1.0.0")
    assert "\n" not in str(caught.value)


def test_the_identity_is_gits_own_or_the_fallback(repository: Path, monkeypatch: pytest.MonkeyPatch):
    here = Git(repository)
    assert here.identity().fallback
    assert here.identity().email == FALLBACK_EMAIL
    git(repository, "config", "user.name", "Åsa <x> Öberg")
    git(repository, "config", "user.email", "asa@example.org")
    who = here.identity()
    assert (who.email, who.fallback) == ("asa@example.org", False)
    assert who.name.startswith("Åsa")


def test_an_identity_in_the_environment_counts(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_COMMITTER_NAME", "Bo")
    monkeypatch.setenv("GIT_COMMITTER_EMAIL", "bo@example.org")
    assert (Git(repository).identity().name, Git(repository).identity().fallback) == ("Bo", False)


def test_a_file_is_read_at_a_revision_and_none_where_it_is_not(repository: Path):
    here = Git(repository)
    assert here.read("HEAD", ".gitignore") == (repository / ".gitignore").read_text()
    assert here.read("HEAD", "nothing") is None


def test_a_commit_of_files_leaves_branch_index_and_tree(repository: Path):
    (repository / "staged").write_text("staged")
    git(repository, "add", "staged")
    (repository / ".gitignore").write_text("changed\n")
    before = (git(repository, "status", "--porcelain=v2"), (repository / ".git" / "index").read_bytes())
    head = git(repository, "rev-parse", "HEAD")
    commit = Git(repository).commit_files({"a/b.txt": "text\n"}, "a message\n", head)
    assert (git(repository, "status", "--porcelain=v2"), (repository / ".git" / "index").read_bytes()) == before
    assert git(repository, "rev-parse", "HEAD") == head
    assert git(repository, "rev-parse", f"{commit}^") == head
    assert git(repository, "diff", "--name-status", head, commit) == "A\ta/b.txt"
    assert list((repository / ".git").glob("proteus-index*")) == []


def test_the_first_commit_needs_no_parent(tmp_path: Path):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    here = Git(tmp_path)
    assert here.head() is None
    commit = here.commit_files({"a": "1\n"}, "first\n", None)
    assert git(tmp_path, "rev-list", "--count", commit) == "1"


def test_a_tag_keeps_its_message_to_the_byte_and_its_time(repository: Path):
    here, head = Git(repository), git(repository, "rev-parse", "HEAD")
    message = "Title\n\n# no comment\n  spaces kept  \n\n\nlast\n"
    oid = here.make_tag("m@v1.0.0", head, message, 1_700_000_000)
    raw = subprocess.run(["git", "-C", str(repository), "cat-file", "tag", oid], capture_output=True, check=True)
    assert raw.stdout.split(b"\n\n", 1)[1].decode() == message
    assert b"tagger proteus <proteus@localhost> 1700000000 +0000" in raw.stdout
    assert git(repository, "tag") == "", "an object that no ref names"


def test_a_tag_of_nothing_is_an_error(repository: Path):
    with pytest.raises(GitError, match="git mktag"):
        Git(repository).make_tag("m@v1.0.0", "0" * 40, "x\n", 0)


def test_objects_are_read_in_one_go_and_none_where_they_are_not(repository: Path):
    here = Git(repository)
    blob, none, tree, odd = here.read_objects(["HEAD:.gitignore", "HEAD:no such file", "HEAD^{tree}", "a b"])
    assert blob
    assert (blob.kind, blob.data) == ("blob", (repository / ".gitignore").read_bytes())
    assert tree
    assert (tree.kind, none, odd) == ("tree", None, None)
    assert here.ids(["HEAD:.gitignore", "HEAD:no such file", "HEAD^{tree}"]) == [blob.oid, None, tree.oid]
    assert here.read_objects([]) == []
    assert here.ids([]) == []
    with pytest.raises(GitError, match="line end"):
        here.read_objects(["HEAD\nHEAD"])


def test_a_tree_lists_its_files_by_path(repository: Path):
    here = Git(repository)
    assert here.tree("HEAD") == {
        name: git(repository, "rev-parse", f"HEAD:{name}") for name in (".dvc/config", ".gitignore")
    }


@pytest.mark.parametrize(
    "names", [("GIT_DIR",), ("GIT_DIR", "GIT_WORK_TREE"), ("GIT_OBJECT_DIRECTORY",), ("GIT_NAMESPACE",)]
)
def test_a_git_hooks_environment_leads_to_no_other_repository(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
):
    git(tmp_path, "init", "--quiet", "hooked")
    hooked, head = tmp_path / "hooked", git(repository, "rev-parse", "HEAD")
    values = {"GIT_DIR": hooked / ".git", "GIT_WORK_TREE": hooked, "GIT_OBJECT_DIRECTORY": hooked / ".git" / "objects"}
    with monkeypatch.context() as patch:
        for name in names:
            patch.setenv(name, str(values.get(name, "space")))
        patch.setenv("GIT_INDEX_FILE", str(hooked / "index"))
        patch.setenv("GIT_PREFIX", "below/")
        here = Git.find(repository)
        assert (here.root, here.head()) == (repository, head)
        tag = here.make_tag("m@v1.0.0", here.commit_files({"a": "1\n"}, "x\n", head), "m\n", 1_700_000_000)
        assert publish(here, {"m@v1.0.0": tag})
    assert git(repository, "show", "m@v1.0.0:a") == "1"
    assert git(hooked, "tag") == ""
    assert not (hooked / "index").exists()


def test_threads_that_commit_at_once_do_not_mix_their_files(repository: Path):
    def commit(number: int) -> str:
        here = Git(repository)
        return here.commit_files({f"{number}/{i}": f"{number}\n" for i in range(4)}, "x\n", here.head())

    with ThreadPoolExecutor(4) as pool:
        commits = list(pool.map(commit, range(8)))
    for number, made in enumerate(commits):
        names = git(repository, "diff", "--name-only", "HEAD", made).split()
        assert names == [f"{number}/{i}" for i in range(4)]
    assert list((repository / ".git").glob("proteus-index*")) == []
