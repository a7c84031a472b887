from __future__ import annotations

import errno
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from entries import Made, make, publish

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.embedder import Embedded
from proteus_pipeline.embeddings.export import check_target, export
from proteus_pipeline.embeddings.stored import content_hash, to_fp32
from proteus_pipeline.errors import ConfigError, StorageError

# Names that np.savez keeps for itself, that look like paths, and that no ASCII holds.
IDS = [
    "sp|P69905|HBA_HUMAN",
    "file",
    "arr_0",
    "args",
    "allow_pickle",
    "kwds",
    "self",
    "a/b/c",
    "../up",
    "é蛋白",
    "x.y",
    "ids",
]


def saved(path: Path, made: Made, ids: list[str]) -> dict[str, np.ndarray]:
    cache = EmbeddingCache(path.parent / "cache")
    publish(cache, made)
    stored = made.recipe.stored
    entries = [Embedded(key, a.shape, stored, content_hash(a, stored)) for key, a in made.arrays.items()]
    export(path, cache, ids, entries)
    return {i: to_fp32(a, stored) for i, a in zip(ids, made.arrays.values(), strict=True)}


def opened(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    import zarr

    group = zarr.open_group(path, mode="r")
    node = group["embeddings"]
    ids = group.attrs["ids"]
    assert isinstance(ids, list)
    return {i: node[n if isinstance(node, zarr.Array) else str(n)][...] for n, i in enumerate(ids)}


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
@pytest.mark.parametrize(("pooling", "stored"), [("mean", "fp32"), ("per_residue", "fp32"), ("per_residue", "bf16")])
def test_every_id_gives_its_own_values(tmp_path: Path, suffix: str, pooling: str, stored: str):
    path = tmp_path / f"out{suffix}"
    expected = saved(path, make(len(IDS), pooling=pooling, stored=stored), IDS)
    found = opened(path)
    assert list(found) == IDS
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", path.name]


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_two_ids_of_one_sequence_are_both_there(tmp_path: Path, suffix: str):
    made = make(1)
    cache = EmbeddingCache(tmp_path / "cache")
    publish(cache, made)
    ((key, array),) = made.arrays.items()
    export(tmp_path / f"o{suffix}", cache, ["a", "b"], [Embedded(key, array.shape, "fp32", "")] * 2)
    found = opened(tmp_path / f"o{suffix}")
    assert found["a"].tobytes() == found["b"].tobytes() == array.tobytes()


def test_an_npz_has_the_same_bytes_each_time(tmp_path: Path):
    for name in ("a.npz", "b.npz"):
        saved(tmp_path / name, make(3), ["x", "y", "z"])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_what_was_there_is_replaced(tmp_path: Path, suffix: str):
    path = tmp_path / f"out{suffix}"
    saved(path, make(5, pooling="per_residue"), list("abcde"))
    expected = saved(path, make(2, seed=1), ["x", "y"])
    found = opened(path)
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in expected.items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", path.name]


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_what_was_there_stays_when_the_new_one_fails(tmp_path: Path, suffix: str):
    path = tmp_path / f"out{suffix}"
    before = saved(path, make(3), list("abc"))
    made = make(2, width=20_000, prefix="large")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = EmbeddingCache(tmp_path / "cache")
    publish(cache, made)
    entries = [Embedded(key, a.shape, "fp32", "") for key, a in made.arrays.items()]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        with pytest.raises(StorageError, match=rf"out\{suffix}"):
            export(path, cache, ["x", "y"], entries)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {k: v.tobytes() for k, v in opened(path).items()} == {k: v.tobytes() for k, v in before.items()}
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
    assert {k: v.tobytes() for k, v in opened(path).items()} == {k: v.tobytes() for k, v in expected.items()}
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


def test_an_embedding_that_is_gone_is_named(tmp_path: Path):
    made = make(1)
    cache = EmbeddingCache(tmp_path / "cache")
    publish(cache, made)
    entries = [Embedded(k, (8,), "fp32", "") for k in (*made.arrays, "0" * 32)]
    with pytest.raises(StorageError, match="the embedding of lost is gone from"):
        export(tmp_path / "o.npz", cache, ["here", "lost"], entries)
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize("name", ["out", "out.csv", "out.npy", "npz"])
def test_an_unknown_kind_of_file_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=rf"{name} is no kind of file to write embeddings to; .*\.npz or \.zarr"):
        check_target(tmp_path / name)


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_a_missing_folder_is_named_before_anything_is_computed(tmp_path: Path, suffix: str):
    check_target(tmp_path / f"out{suffix}")
    with pytest.raises(StorageError, match=r"below does not exist; create it first"):
        check_target(tmp_path / "below" / f"out{suffix}")
