from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import git

from proteus_pipeline.registry.listing import listed


@pytest.fixture
def made() -> list[int]:
    return []


@pytest.fixture
def lines_of(made: list[int]) -> Callable[[], list[tuple[str, str]]]:
    """Lines that say how often they were made."""

    def lines() -> list[tuple[str, str]]:
        made.append(1)
        return [("m", f"m@v1 made {len(made)}"), ("m/n", "m/n@v1"), ("é", "tab\tand é")]

    return lines


def test_lines_are_made_once_for_the_same_tags(repository: Path, lines_of: Callable, made: list[int]):
    git(repository, "tag", "a")
    assert listed(repository, None, lines_of) == ["m@v1 made 1", "m/n@v1", "tab\tand é"]
    assert listed(repository, "m", lines_of) == ["m@v1 made 1"]
    assert listed(repository, "nobody", lines_of) == []
    assert len(made) == 1
    git(repository, "tag", "b")
    assert listed(repository, "m", lines_of) == ["m@v1 made 2"]
    git(repository, "tag", "-d", "b")
    assert listed(repository, "m", lines_of) == ["m@v1 made 3"], "other tags, though they were the same once"
    git(repository, "-c", "user.name=A", "-c", "user.email=a@b", "tag", "-f", "-a", "-m", "x", "a")
    assert listed(repository, "m", lines_of) == ["m@v1 made 4"], "the same name, and another object"
    git(repository, "pack-refs", "--all")
    assert listed(repository, "m", lines_of) == ["m@v1 made 4"]


def test_only_the_models_whose_tags_changed_are_made_anew(repository: Path):
    asked: list[tuple[str, ...]] = []

    def lines_of(*names: str) -> list[tuple[str, str]]:
        asked.append(names)
        tags = git(repository, "tag", "--sort=v:refname").split()
        found = sorted(((tag.split("@")[0], tag) for tag in tags if "@v" in tag), key=lambda pair: pair[0])
        return [(model, f"{tag} made {len(asked)}") for model, tag in found if not names or model in names]

    for tag in ("b@v1.10.0", "b@v1.2.0", "c/d@v1.0.0"):
        git(repository, "tag", tag)
    assert listed(repository, None, lines_of) == ["b@v1.2.0 made 1", "b@v1.10.0 made 1", "c/d@v1.0.0 made 1"]
    git(repository, "tag", "b@v1.3.0")
    made_2 = ["b@v1.2.0 made 2", "b@v1.3.0 made 2", "b@v1.10.0 made 2"]
    assert listed(repository, None, lines_of) == [*made_2, "c/d@v1.0.0 made 1"]
    git(repository, "tag", "-d", "c/d@v1.0.0")
    git(repository, "tag", "a#current#1")
    git(repository, "tag", "a@v1.0.0")
    assert listed(repository, None, lines_of) == ["a@v1.0.0 made 3", *made_2]
    assert listed(repository, "b", lines_of) == made_2
    for model in "efghi":
        git(repository, "tag", f"{model}@v1.0.0")
    assert len(listed(repository, None, lines_of)) == 9
    git(repository, "tag", "x@v1.0.0")
    git(repository, "tag", "y-/z@v1.0.0")
    assert len(listed(repository, None, lines_of)) == 11
    assert asked == [(), ("b",), ("a", "c/d"), (), ()], "many models, or a tag that no version has: all of them"


def test_a_file_that_is_not_whole_is_made_anew(repository: Path, lines_of: Callable, made: list[int]):
    git(repository, "tag", "a")
    listed(repository, None, lines_of)
    path = repository / ".proteus" / "listing"
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert listed(repository, "m/n", lines_of) == ["m/n@v1"]
        assert path.read_bytes() != damaged
    assert len(made) == 1 + len(whole)
    path.write_bytes(whole[:-9])
    assert listed(repository, "m/n", lines_of) == ["m/n@v1"]


def test_nothing_to_list_is_remembered_too(repository: Path, made: list[int]):
    def none() -> list[tuple[str, str]]:
        made.append(1)
        return []

    assert listed(repository, None, none) == []
    assert listed(repository, None, none) == []
    assert len(made) == 1


def test_where_nothing_can_be_kept_it_is_listed_all_the_same(repository: Path, lines_of: Callable, made: list[int]):
    (repository / ".proteus").touch()
    assert listed(repository, "m", lines_of) == ["m@v1 made 1"]
    assert listed(repository, "m", lines_of) == ["m@v1 made 2"]


def test_outside_git_there_is_no_listing(tmp_path: Path, lines_of: Callable, monkeypatch: pytest.MonkeyPatch):
    assert listed(tmp_path, None, lines_of) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert listed(tmp_path, None, lines_of) is None
