"""What the cache's verbs ask of a project, beside the cache itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.sequences.fasta import Record
from proteus_pipeline.stages import caching
from proteus_pipeline.stages.compose import check_cache_folders, check_is_cache
from proteus_pipeline.stages.importing import Loaded, load
from proteus_pipeline.stages.project import Project

TRUNK, OTHER = "0123456789abcdef" * 2, "f" * 32
GONE = StorageError("m@v1.0.0: its weights are nowhere", "fetch them")


class Version:
    """A version by its trunk digest, or by why that can't be told; with a record, or tagged by gto."""

    damage = None
    reference = "m@v1.0.0"

    def __init__(self, trunk: str | StorageError, *, record: bool) -> None:
        self._trunk = trunk
        size = {"layers": 6, "width": 8}
        self.record = SimpleNamespace(trunk_digest=trunk, architecture=size) if record else None
        self._architecture = SimpleNamespace(**size)

    @property
    def checkpoint(self) -> Any:
        assert self.record is None, "weights are read only where there is no record"
        if isinstance(self._trunk, StorageError):
            raise self._trunk
        return SimpleNamespace(trunk_digest=self._trunk, architecture=self._architecture)


def publish(cache: EmbeddingCache) -> None:
    """Store four embeddings."""
    recipe = Recipe(layer=2)
    keys = [recipe.key(TRUNK, s) for s in ("MA", "MK", "MV", "MY")]
    attestation = Attestation("cpu", "2.0.0", "2026-01-01T00:00:00+00:00", 1.0, 16)
    cache.publish(keys, [np.ones(8, "<f4")] * 4, [2] * 4, trunk=TRUNK, recipe=recipe, attestation=attestation)


class Projects(Project):
    """A project with versions of a test's own."""

    manager: Any = None


def project_of(folder: Path, versions: Sequence[Version]) -> Project:
    made = Projects(folder, folder)
    made.__dict__["manager"] = SimpleNamespace(list_models=lambda: {"m": versions}, resolve=lambda _: versions[0])
    return made


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    made = EmbeddingCache(tmp_path / ".proteus/cache")
    publish(made)
    return made


def gone(project: Project, cache: EmbeddingCache) -> int:
    return len(caching.collect(project, cache, 0.0, dry_run=True).retired)


@pytest.mark.parametrize("record", [True, False])
def test_what_a_version_made_is_kept_whoever_tagged_it(tmp_path: Path, cache: EmbeddingCache, *, record: bool):
    assert gone(project_of(tmp_path, [Version(TRUNK, record=record)]), cache) == 0
    assert gone(project_of(tmp_path, [Version(OTHER, record=record)]), cache) == 1
    ((content, names),) = caching.contents(project_of(tmp_path, [Version(TRUNK, record=record)]), cache)
    assert (content.entries, names) == (4, ["m@v1.0.0"])


def test_nothing_is_unreachable_where_a_versions_weights_can_not_be_told(
    tmp_path: Path, cache: EmbeddingCache, capsys: pytest.CaptureFixture[str]
):
    damaged = Version(OTHER, record=False)
    damaged.damage = IntegrityError("the record of m@v2.0.0 is damaged")  # type: ignore[assignment]
    for version in (Version(GONE, record=False), damaged):
        assert gone(project_of(tmp_path, [Version(OTHER, record=True), version]), cache) == 0
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("note: no weights count as unreachable") and err.count("\n") == 1


def test_composed_yaml_is_passed_over_only_where_there_is_none(
    tmp_path: Path, cache: EmbeddingCache, capsys: pytest.CaptureFixture[str]
):
    project, composed = project_of(tmp_path, [Version(OTHER, record=True)]), tmp_path / "composed.yaml"
    assert (gone(project, cache), capsys.readouterr().err) == (1, "")
    for trunk, number in ((TRUNK, 0), (None, 1), (OTHER, 1)):
        composed.write_text(yaml.safe_dump({"stages": {"embed": {"model": {"trunk_digest": trunk}}}}))
        assert (gone(project, cache), capsys.readouterr().err) == (number, "")
    for text in ("", "{", "[]", "stages: 3", "stages: {embed: {}}", "stages: {embed: {model: x}}"):
        composed.write_text(text)
        assert gone(project, cache) == 0, text
        assert "composed.yaml is damaged" in capsys.readouterr().err
    composed.unlink()
    composed.mkdir()
    assert gone(project, cache) == 0
    assert "cannot read" in capsys.readouterr().err


def test_a_cache_elsewhere_may_be_others_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    elsewhere = EmbeddingCache(tmp_path / "group")
    publish(elsewhere)
    (tmp_path / "project").mkdir()
    assert gone(project_of(tmp_path / "project", [Version(GONE, record=False)]), elsewhere) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("record", [True, False])
def test_an_invalidation_is_of_a_layer_that_there_is(cache: EmbeddingCache, *, record: bool):
    version: Any = Version(TRUNK, record=record)  # 6 layers, and entries of layer 2
    for layer, number in ((2, 4), (-5, 4), (-1, 0), (6, 0), (None, 4)):
        assert caching.invalidate(version, cache, "why", layer=layer, dry_run=True) == number
    for wrong in ({"layer": 99}, {"layer": 7}, {"layer": -8}, {"pooling": "nonsense"}, {"pooling": ""}):
        with pytest.raises(ConfigError, match=f"^--{next(iter(wrong))} is "):
            caching.invalidate(version, cache, "why", **wrong)
    for reason in ("", " \n"):
        with pytest.raises(ConfigError, match="--reason is empty"):
            caching.invalidate(version, cache, reason)
    assert cache.stats()["entries"] == 4
    assert caching.invalidate(version, cache, "why", layer=-5, pooling="mean") == 4


def asked(cache: EmbeddingCache, **recipe: Any) -> caching.Asked:
    records = [Record(i, "MKV", "") for i in ("one", "two")]
    return caching.Asked(cache, records, "m@v1.0.0", TRUNK, Recipe(**{"layer": 2} | recipe), {})


@pytest.mark.parametrize("record", [True, False])
def test_an_import_is_as_wide_as_the_model(tmp_path: Path, cache: EmbeddingCache, *, record: bool):
    project = project_of(tmp_path, [Version(TRUNK, record=record)])
    for name, wide, pooled in (("wide", 9, True), ("right", 8, True), ("narrow", 7, False)):
        array = np.zeros(wide if pooled else (3, wide), np.float32)
        np.savez(tmp_path / f"{name}.npz", one=array, nobody=array)
    recipe = {"pooling": "per_residue"}
    for name, chosen in (("wide", {}), ("narrow", recipe)):
        with pytest.raises(ConfigError, match=r"array of 'one' is [79] wide, and m@v1\.0\.0 makes 8"):
            load(project, asked(cache, **chosen), tmp_path / f"{name}.npz")
    assert cache.stats()["entries"] == 4
    assert load(project, asked(cache), tmp_path / "right.npz") == Loaded(1, ["nobody"], 0)


def test_an_import_says_what_it_skipped(tmp_path: Path, cache: EmbeddingCache):
    import torch

    (tmp_path / "esm").mkdir()
    for name in ("one", "two", "nobody"):
        value = {
            "label": name,
            "mean_representations": {layer: torch.zeros(8) for layer in (2, 5)},
            "representations": {2: torch.zeros(3, 8)},
        }
        torch.save(value, tmp_path / "esm" / f"{name}.pt")
    project = project_of(tmp_path, [Version(TRUNK, record=True)])
    done = load(project, asked(cache), tmp_path / "esm")
    assert (done.imported, done.skipped) == (1, 4)  # the two proteins have one sequence
    assert done.unknown == ["nobody"] * 3


def settings(path: str = ".proteus/cache", shared: str | None = None) -> Any:
    return SimpleNamespace(path=path, shared=shared, redis=None)


def test_a_file_in_the_caches_place_is_named_with_its_key(tmp_path: Path):
    project = project_of(tmp_path, [])
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "lost").symlink_to("nowhere")
    for path in ("README.md", "README.md/cache", str(tmp_path / "README.md"), "lost"):
        with pytest.raises(StorageError, match=r"^cache\.path is .*(README\.md|lost) is no folder"):
            check_cache_folders(project, settings(path))
    for path in (".proteus/cache", "a/b/c", str(tmp_path)):
        check_cache_folders(project, settings(path))


def test_a_source_that_is_no_cache_is_named(tmp_path: Path, cache: EmbeddingCache):
    project = project_of(tmp_path, [])
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, why in (("nosuch", "does not exist"), ("file", "is no folder"), ("empty", "is no embedding cache")):
        with pytest.raises(StorageError, match=f"^--from: .*{name} {why}"):
            check_is_cache(tmp_path / name, "--from")
        with pytest.raises(StorageError, match=rf"^cache\.shared: .*{name} {why}"):
            check_cache_folders(project, settings(shared=name))
    check_is_cache(cache.path, "--from")
    for name in ("seg", "uses.jsonl", "runs"):
        (tmp_path / f"has {name}" / name).mkdir(parents=True)
        check_cache_folders(project, settings(shared=f"has {name}"))
