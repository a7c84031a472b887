"""What can't be exported is refused in one line, before anything is computed or written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from entries import make, publish
from exported import SUFFIXES, embedded, provenance, saved

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.export import check_target, export
from proteus_pipeline.errors import ConfigError, StorageError


@pytest.mark.parametrize("name", ["out", "out.csv", "out.npy", "npz", "out.H5", "out.hdf5"])
def test_an_unknown_kind_of_file(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=rf"{name} is no kind of file to write embeddings to; .*\.npz or \.zarr$"):
        check_target(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_folder(tmp_path: Path, suffix: str):
    check_target(tmp_path / f"out{suffix}")
    with pytest.raises(StorageError, match=r"below does not exist; create it first"):
        check_target(tmp_path / "below" / f"out{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_where_a_file_will_be_and_a_file_where_a_folder_will_be(tmp_path: Path, suffix: str):
    path, folder = tmp_path / f"out{suffix}", suffix in {".zarr", ".pt"}
    path.write_text("mine") if folder else path.mkdir()
    with pytest.raises(StorageError, match=r"out.* is a (file|folder), and a .* export is a (file|folder); choose"):
        check_target(path)


def test_a_folder_that_holds_more_than_an_export_is_not_replaced(tmp_path: Path):
    path = tmp_path / "out.pt"
    saved(path, make(2), ["x", "y"])
    check_target(path)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"out\.pt holds notes\.txt, which no export wrote; choose another name"):
        saved(path, make(1), ["x"])
    assert sorted(p.name for p in path.iterdir()) == ["notes.txt", "x.pt", "y.pt"]


@pytest.mark.parametrize(("suffix", "library"), [(".h5", "h5py"), (".h5ad", "anndata"), (".parquet", "pyarrow")])
def test_a_library_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, library: str):
    find_spec = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> Any:
        return None if name == library else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(ConfigError, match=rf"needs {library}, .*; pip install 'proteus_pipeline\[export\]'$"):
        check_target(tmp_path / f"out{suffix}")


@pytest.mark.parametrize(
    ("suffix", "pooling", "remedy"),
    [
        (
            ".h5ad",
            "per_residue",
            r"write to a \.h5 or \.parquet or \.pt or \.npz or \.zarr, or use embedding\.pooling=mean",
        ),
        (".pt", "max", r"write to a \.h5 or \.h5ad or \.parquet or \.npz or \.zarr, or use embedding\.pooling=mean"),
        (".pt", "attention", r"write to a \.h5 or"),
    ],
)
def test_a_pooling_that_the_format_has_no_place_for(tmp_path: Path, suffix: str, pooling: str, remedy: str):
    message = rf"^a \{suffix} has no place for {pooling} embeddings; {remedy}"
    with pytest.raises(ConfigError, match=message):
        check_target(tmp_path / f"out{suffix}", pooling)
    made = make(2, pooling=pooling)
    cache = EmbeddingCache(tmp_path / "cache")
    publish(cache, made)
    with pytest.raises(ConfigError, match=message):
        export(tmp_path / f"out{suffix}", cache, ["x", "y"], embedded(made), provenance(made))
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_residues_are_known_without_provenance(tmp_path: Path):
    made = make(1, pooling="per_residue")
    with pytest.raises(ConfigError, match=r"a \.h5ad has no place for per_residue"):
        export(tmp_path / "o.h5ad", EmbeddingCache(tmp_path / "cache"), ["x"], embedded(made))


def test_a_fair_esm_folder_without_a_recipe(tmp_path: Path):
    made = make(1)
    cache = EmbeddingCache(tmp_path / "cache")
    publish(cache, made)
    for told in (None, {}, {"recipe": {}}, {"recipe": {"layer": None, "pooling": "mean"}}, {"recipe": {"layer": 1}}):
        with pytest.raises(
            ConfigError, match="fair-esm's files say which layer and pooling they hold; give provenance="
        ):
            export(tmp_path / "o.pt", cache, ["x"], embedded(made), told)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("letter", ["a", "é", "蛋"])
def test_an_id_that_is_too_long_for_a_files_name(tmp_path: Path, letter: str):
    longest = 252 // len(letter.encode())
    saved(tmp_path / "o.pt", make(1), [letter * longest])
    with pytest.raises(
        StorageError, match=r"^the id .* has 25\d bytes, and a \.pt holds at most 252; write to a \.zarr"
    ):
        check_target(tmp_path / "p.pt", ids=[letter * (longest + 1)])


@pytest.mark.parametrize("name", ["a/b", "/etc/passwd", "../up", "..", ".", "", ".hidden", "a\\b", "a\0b"])
def test_an_id_that_is_no_files_name(tmp_path: Path, name: str):
    with pytest.raises(
        StorageError, match=r"^the id .* can't be a file's name, and in a \.pt it is one; write to a \.h5"
    ):
        saved(tmp_path / "out.pt", make(2), ["x", name])
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    if "\0" not in name and name:
        saved(tmp_path / "out.h5", make(2), ["x", name])
