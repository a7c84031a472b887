from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import git, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.errors import ConfigError, StaleLockError, VersionNotFoundError
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry.lock import Locked, read_lock, resolve_locked, write_lock
from proteus_pipeline.registry.versions import ModelVersionManager

DIGEST = "0123456789abcdef0123456789abcdef"
LOCKED = {"esm2@latest": Locked("1.0.1", DIGEST, DIGEST[::-1]), "esm2@1.x": Locked("1.0.0", DIGEST, "1" * 32)}
TEXT = """\
# What floating references mean. Written by `proteus model lock`; commit it.
schema: 1
references:
  esm2@1.x:
    version: 1.0.0
    model: 0123456789abcdef0123456789abcdef
    trunk: '11111111111111111111111111111111'
  esm2@latest:
    version: 1.0.1
    model: 0123456789abcdef0123456789abcdef
    trunk: fedcba9876543210fedcba9876543210
"""
digests = st.text("0123456789abcdef", min_size=32, max_size=32)


@dataclass
class Given:
    name: str
    checkpoint: Checkpoint
    source: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def manager(repository: Path, tiny: Checkpoint) -> ModelVersionManager:
    """A registry of m@v1.0.0 and m@v1.1.0."""
    manager = ModelVersionManager(repository)
    manager.register_version(Given("m", tiny), "1.0.0")
    manager.register_version(Given("m", make_checkpoint(seed=1)), "1.1.0")
    return manager


def test_the_file_is_this_to_the_byte_whatever_the_order(tmp_path: Path):
    path = tmp_path / "models.lock"
    write_lock(path, LOCKED)
    assert path.read_text() == TEXT
    assert read_lock(path) == LOCKED
    write_lock(path, dict(reversed(LOCKED.items())))
    assert path.read_text() == TEXT


@given(st.dictionaries(st.sampled_from(["a@latest", "a/b@1.x", "m@2.3.x", "m@current"]), st.tuples(digests, digests)))
def test_any_lock_comes_back(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, tuple[str, str]]):
    path = tmp_path_factory.mktemp("lock") / "models.lock"
    locked = {reference: Locked("1.2.3", *pair) for reference, pair in entries.items()}
    write_lock(path, locked)
    assert read_lock(path) == locked


def test_a_missing_file_and_an_empty_lock_lock_nothing(tmp_path: Path):
    path = tmp_path / "models.lock"
    assert read_lock(path) == {}
    write_lock(path, {})
    assert read_lock(path) == {}
    path.write_text("schema: 1\nreferences:\n")
    assert read_lock(path) == {}


@pytest.mark.parametrize(("schema", "shown"), [("2", "2"), ("'1'", "'1'"), ("", "None")])
def test_another_schema_is_refused(tmp_path: Path, schema: str, shown: str):
    path = tmp_path / "models.lock"
    path.write_text(TEXT.replace("schema: 1", f"schema: {schema}"))
    with pytest.raises(ConfigError, match=rf"models\.lock has schema {shown}, and this proteus reads 1"):
        read_lock(path)


@pytest.mark.parametrize(
    "text",
    [
        "schema: 1\nreferences: [",
        "- a\n",
        "words\n",
        "schema: 1\n",
        "schema: 1\nreferences: [a]\n",
        "schema: 1\nreferences:\n  m@latest: 1.0.0\n",
        "schema: 1\nreferences:\n  m@latest: {version: 1.0.0}\n",
        "schema: 1\nreferences:\n  m@latest: {version: 1.0, model: a, trunk: b}\n",
        "schema: 1\nreferences:\n  m@latest: {version: 1.0.0, model: 12, trunk: b}\n",
        "schema: 1\nreferences:\n  m@latest: {version: 1.0.0, model: a, trunk: b, more: c}\n",
        "schema: 1\nreferences:\n  not a name: {version: 1.0.0, model: a, trunk: b}\n",
        "schema: 1\nreferences:\n  7: {version: 1.0.0, model: a, trunk: b}\n",
        "<<<<<<< HEAD\nschema: 1\n=======\nschema: 1\n>>>>>>> branch\n",
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, text: str):
    path = tmp_path / "models.lock"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"models\.lock is damaged") as caught:
        read_lock(path)
    assert "proteus model lock" in caught.value.remedy


def test_bytes_that_are_no_text_are_damage(tmp_path: Path):
    (tmp_path / "models.lock").write_bytes(b"schema: 1\n\xff\xfe")
    with pytest.raises(ConfigError, match="is damaged"):
        read_lock(tmp_path / "models.lock")


def test_an_exact_reference_needs_no_lock(manager: ModelVersionManager):
    assert resolve_locked(manager, "m@1.0.0", {}).reference == "m@v1.0.0"
    with pytest.raises(VersionNotFoundError):
        resolve_locked(manager, "m@3.0.0", {})


@pytest.mark.parametrize("reference", ["m", "m@current", "m@latest", "m@1.x"])
def test_a_floating_reference_that_is_not_locked_names_the_command(manager: ModelVersionManager, reference: str):
    with pytest.raises(StaleLockError, match=r"models\.lock does not hold; run: proteus model lock") as caught:
        resolve_locked(manager, reference, {"other@latest": Locked("1.0.0", DIGEST, DIGEST)})
    assert caught.value.exit_code == 3


def test_a_floating_reference_means_what_the_lock_says_and_not_what_is_newest(manager: ModelVersionManager):
    locked = {"m@current": Locked.of(manager.get_version("m", "1.0.0"))}
    assert manager.resolve("m").version == "1.1.0"
    assert resolve_locked(manager, "m", locked).version == "1.0.0"


@pytest.mark.parametrize("part", ["model", "trunk"])
def test_other_weights_than_the_lock_says_are_stale(manager: ModelVersionManager, part: str):
    known = Locked.of(manager.get_version("m", "1.0.0"))
    wrong = {"model": known.model, "trunk": known.trunk} | {part: DIGEST}
    with pytest.raises(StaleLockError, match=r"m@latest is v1\.0\.0 .*; .*proteus model lock --update"):
        resolve_locked(manager, "m@latest", {"m@latest": Locked("1.0.0", **wrong)})


def test_a_tag_without_a_record_is_locked_by_its_weights(manager: ModelVersionManager, repository: Path):
    with_record = manager.get_version("m", "1.0.0")
    git(repository, "tag", "m@v3.0.0", with_record.commit)
    bare = manager.get_version("m", "3.0.0")
    assert bare.record is None
    assert (Locked.of(bare).model, Locked.of(bare).trunk) == (
        Locked.of(with_record).model,
        Locked.of(with_record).trunk,
    )
