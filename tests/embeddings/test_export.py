from __future__ import annotations

import errno
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from entries import make, publish
from exported import IDS, PATHS, SUFFIXES, embedded, opened, provenance, saved

from proteus_pipeline.embeddings import selection
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.computing import Embedded
from proteus_pipeline.embeddings.export import export
from proteus_pipeline.errors import StorageError

RESIDUES = [s for s in SUFFIXES if s != ".h5ad"]


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in expected.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("pooling", "stored"), [("mean", "fp32"), ("per_residue", "fp32"), ("per_residue", "bf16")])
@pytest.mark.parametrize("batch", [1, 500, 1 << 20])
def test_every_id_gives_its_own_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, pooling: str, stored: str, batch: int
):
    if (suffix, pooling) == (".h5ad", "per_residue"):
        return  # refused, below
    monkeypatch.setattr(selection, "BATCH_BYTES", batch)
    path = tmp_path / f"out{suffix}"
    ids = IDS if suffix == ".pt" else IDS + PATHS
    expected = saved(path, make(len(ids), pooling=pooling, stored=stored), ids)
    found = opened(path)
    assert (sorted(found) if suffix == ".pt" else list(found)) == (sorted(ids) if suffix == ".pt" else ids)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", path.name]


@pytest.mark.parametrize("suffix", RESIDUES)
def test_residues_are_not_all_held_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str):
    monkeypatch.setattr(selection, "BATCH_BYTES", 2 << 20)
    made = make(40, pooling="per_residue", width=20_000)  # 0.24 to 0.88 MB each
    cache = EmbeddingCache(tmp_path / "cache")
    publish(cache, made)
    ids = [str(n) for n in range(40)]
    export(tmp_path / f"first{suffix}", cache, ids[:1], embedded(made)[:1], provenance(made))  # imports what it needs
    tracemalloc.start()
    export(tmp_path / f"out{suffix}", cache, ids, embedded(made), provenance(made))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(a.nbytes for a in made.arrays.values()) > 20e6
    assert peak < 10e6


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_ids_of_one_sequence_are_both_there(tmp_path: Path, suffix: str):
    made = make(1)
    cache = EmbeddingCache(tmp_path / "cache")
    publish(cache, made)
    ((key, array),) = made.arrays.items()
    entries = [Embedded(key, array.shape, "fp32", "")] * 2
    export(tmp_path / f"o{suffix}", cache, ["a", "b"], entries, provenance(made))
    found = opened(tmp_path / f"o{suffix}")
    assert found["a"].tobytes() == found["b"].tobytes() == array.tobytes()


def test_an_npz_has_the_same_bytes_each_time(tmp_path: Path):
    for name in ("a.npz", "b.npz"):
        saved(tmp_path / name, make(3), ["x", "y", "z"])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_there_is_replaced(tmp_path: Path, suffix: str):
    path = tmp_path / f"out{suffix}"
    saved(path, make(5, pooling="mean" if suffix == ".h5ad" else "per_residue"), list("abcde"))
    assert same(opened(path), saved(path, make(2, seed=1), ["x", "y"])) is False
    assert same(opened(path), saved(path, make(2, seed=1), ["x", "y"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_there_stays_when_the_new_one_fails(tmp_path: Path, suffix: str):
    path = tmp_path / f"out{suffix}"
    before = saved(path, make(3), list("abc"))
    made = make(2, width=20_000, prefix="large")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = EmbeddingCache(tmp_path / "cache")
    publish(cache, made)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        with pytest.raises(StorageError, match=rf"^cannot write .*out\{suffix}: file too large; raise the limit"):
            export(path, cache, ["x", "y"], embedded(made), provenance(made))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(opened(path), before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", path.name]


def test_a_zarr_that_cant_take_its_place_gives_the_former_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "out.zarr"
    saved(path, make(3), list("abc"))
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if target == path and not self.stem.endswith("-old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(StorageError, match=r"out\.zarr can't be written"):
        saved(path, make(2), ["x", "y"])
    assert list(opened(path)) == ["a", "b", "c"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out.zarr"]


def test_an_unfinished_export_of_a_killed_run_is_in_nobodys_way(tmp_path: Path):
    left = [".tmp-00-old.zarr", ".tmp-00.zarr"]
    for name in left:
        (tmp_path / name / "embeddings").mkdir(parents=True)
    saved(tmp_path / "out.zarr", make(2), ["x", "y"])
    assert list(opened(tmp_path / "out.zarr")) == ["x", "y"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*left, "cache", "out.zarr"]


def test_an_export_does_not_take_away_what_another_one_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import zarr

    path, create_array = tmp_path / "out.zarr", zarr.Group.create_array

    def overtaken(group: zarr.Group, *args: Any, **kwargs: Any) -> Any:
        array = create_array(group, *args, **kwargs)
        monkeypatch.setattr(zarr.Group, "create_array", create_array)
        saved(path, make(2, prefix="other"), ["x", "y"])
        assert list(opened(path)) == ["x", "y"]
        return array

    monkeypatch.setattr(zarr.Group, "create_array", overtaken)
    expected = saved(path, make(3, pooling="per_residue"), list("abc"))
    assert same(opened(path), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out.zarr"]


@pytest.mark.parametrize("letter", ["a", "é", "蛋"])
def test_an_id_that_is_too_long_for_an_npz_is_named(tmp_path: Path, letter: str):
    longest = 65_531 // len(letter.encode())
    saved(tmp_path / "o.npz", make(1), [letter * longest])
    assert list(opened(tmp_path / "o.npz")) == [letter * longest]
    with pytest.raises(StorageError, match=rf"^the id '{letter * 57}\.\.\.' has 65,53\d bytes.*write to a \.zarr"):
        saved(tmp_path / "p.npz", make(1), [letter * (longest + 1)])
    assert not (tmp_path / "p.npz").exists()
    saved(tmp_path / "o.zarr", make(1), [letter * (longest + 1)])
    assert list(opened(tmp_path / "o.zarr")) == [letter * (longest + 1)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_embedding_that_is_gone_is_named(tmp_path: Path, suffix: str):
    made = make(1)
    cache = EmbeddingCache(tmp_path / "cache")
    publish(cache, made)
    entries = [Embedded(k, (8,), "fp32", "") for k in (*made.arrays, "0" * 32)]
    with pytest.raises(StorageError, match="the embedding of lost is gone from"):
        export(tmp_path / f"o{suffix}", cache, ["here", "lost"], entries, provenance(made))
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("ids", [[], ["a"], ["a", "a"]])
def test_ids_that_do_not_fit_the_entries_are_a_mistake_of_the_caller(tmp_path: Path, ids: list[str]):
    with pytest.raises(ValueError, match="give one each, and each id once"):
        export(tmp_path / "o.npz", EmbeddingCache(tmp_path / "cache"), ids, embedded(make(2)))
    assert not list(tmp_path.iterdir())
