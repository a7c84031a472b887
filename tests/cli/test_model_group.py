"""``proteus model push`` and ``pull`` between clones that share a git remote and a bucket."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import git, make_checkpoint
from groups import Group

from proteus_pipeline.cli.main import main
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.registry.versions import ModelVersionManager

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def proteus(
    group: Group, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run ``proteus model`` in one of the clones one, two, ..., each with its own HOME."""
    git(repository, "push", "--quiet", str(group.hub), "main")
    git(group.hub, "symbolic-ref", "HEAD", "refs/heads/main")
    monkeypatch.setenv("PROTEUS_S3_URL", group.url)

    def run(clone: str, *args: str) -> tuple[int, str, str]:
        if not (tmp_path / clone).exists():
            git(tmp_path, "clone", "--quiet", str(group.hub), clone)
        monkeypatch.chdir(tmp_path / clone)
        monkeypatch.setenv("HOME", str(tmp_path / f"home of {clone}"))
        code = main(["model", *args])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


def test_push_sends_weights_and_tags_and_pull_brings_them(proteus: Run, group: Group, tmp_path: Path):
    for seed in range(2):
        write_folder(make_checkpoint(seed=seed), tmp_path / str(seed))
    assert proteus("three", "register", "m", "--version", "1.0.0", "--weights", str(tmp_path / "1"))[0] == 0
    assert proteus("one", "register", "m", "--version", "1.0.0", "--weights", str(tmp_path / "0"))[0] == 0
    assert proteus("one", "push", "m@v1.0.0", "--no-tags")[1].endswith(
        "objects sent; its tag: git push origin m@v1.0.0\n"
    )
    assert group.published() == {}
    code, out, _ = proteus("one", "push", "m@v1.0.0")
    assert (code, out.endswith(": 0 objects sent; its tags are on the git remote: 1 sent\n")) == (0, True)
    assert proteus("two", "pull", "m@v1.0.0")[:2] == (0, "m@v1.0.0 is here\n")
    assert json.loads(proteus("two", "verify", "--json")[1])["findings"] == []
    # Events travel, too.
    assert proteus("one", "register", "m", "--version", "1.1.0", "--weights", str(tmp_path / "1"))[0] == 0
    assert proteus("one", "rollback", "m@v1.0.0")[0] == 0
    assert len(json.loads(proteus("one", "push", "m@v1.0.0", "--json")[1])["tags"]) == 1
    assert json.loads(proteus("one", "push", "m@v1.1.0", "--json")[1])["tags"] == ["m@v1.1.0"]
    assert proteus("two", "pull", "m@v1.1.0")[0] == 0
    assert ModelVersionManager(tmp_path / "two").resolve("m").version == "1.0.0"
    # The remote's tag is the group's, whoever else has one of that name.
    before = group.published()
    code, _, err = proteus("three", "push", "m@v1.0.0")
    assert (code, "m@v1.0.0 on origin is another one" in err) == (5, True)
    assert group.published() == before


def test_what_can_t_be_reached_is_one_line(proteus: Run, group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(make_checkpoint(), tmp_path / "0")
    assert proteus("one", "register", "m", "--version", "1.0.0", "--weights", str(tmp_path / "0"))[0] == 0
    group.hub.rename(tmp_path / "gone")
    code, _, err = proteus("one", "push", "m")
    assert (code, err.count("\n"), "the git remote origin can't be reached" in err) == (1, 1, True)
    code, out, err = proteus("one", "pull", "m")
    assert (code, out, err.startswith("warning: going by the tags that are here: origin: ")) == (
        0,
        "m@v1.0.0 is here\n",
        True,
    )
    monkeypatch.setenv("PROTEUS_S3_URL", "https://key:hidden@example.org")
    code, _, err = proteus("one", "push", "m")
    assert (code, err.count("\n"), "hidden" in err) == (2, 1, False)
    git(tmp_path / "one", "remote", "rename", "origin", "a")
    git(tmp_path / "one", "remote", "add", "b", "nowhere")
    code, _, err = proteus("one", "push", "m")
    assert (code, "has the git remotes a, b, and none is origin" in err) == (2, True)
