"""Embeddings from other programs' files; and files that are none, or worse."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from entries import make
from exported import IDS, PATHS, saved

from proteus_pipeline.embeddings.imports import Imported, read_npz, read_pt
from proteus_pipeline.errors import StorageError

A = np.arange(4, dtype=np.float32)
T = torch.from_numpy(A)


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return pytest.fail, ("a pickle was executed",)


def one_line(error: pytest.ExceptionInfo[StorageError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("pooling", ["mean", "per_residue"])
def test_an_npz_that_was_exported_comes_back(tmp_path: Path, pooling: str):
    ids = IDS + PATHS
    expected = saved(tmp_path / "o.npz", make(len(ids), pooling=pooling), ids)
    found = list(read_npz(tmp_path / "o.npz"))
    assert [f.id for f in found] == ids
    for f in found:
        assert f.array.dtype == np.float32
        assert f.array.tobytes() == expected[f.id].tobytes()
        assert (f.layer, f.pooling) == (None, "per_residue" if pooling == "per_residue" else None)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_npz_of_numpys_own(tmp_path: Path, write: Callable[..., None]):
    rows = np.arange(12, dtype=np.float64).reshape(3, 4)
    write(tmp_path / "o.npz", a=A.astype(np.float16), b=np.asfortranarray(rows), c=rows.astype(">f4"))
    found = {f.id: f for f in read_npz(tmp_path / "o.npz")}
    assert {f.array.dtype for f in found.values()} == {np.dtype(np.float32)}
    assert np.array_equal(found["a"].array, A)
    assert np.array_equal(found["b"].array, rows)
    assert np.array_equal(found["c"].array, rows)
    assert found["b"].array.flags.c_contiguous and found["b"].array.flags.writeable


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def claims(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    """Return a .npy whose header says more than follows."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(16)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "holds no arrays"),
        ({"a.txt": b"x"}, "holds 'a.txt', which is no array"),
        ({".npy": npy(A)}, "which is no array"),
        ({"a.npy": npy(np.array([Hostile()], dtype=object))}, "an array of object"),
        ({"a.npy": npy(np.array(["x"]))}, "an array of <U1"),
        ({"a.npy": npy(np.arange(3))}, "an array of int64"),
        ({"a.npy": npy(np.array(A, dtype=[("x", "<f4")]))}, "an array of "),
        ({"a.npy": npy(A)[:-1]}, r"an array that says it is \(4,\)"),
        ({"a.npy": npy(A) + b"x"}, r"an array that says it is \(4,\)"),
        ({"a.npy": claims((1 << 40,))}, "an array that says it is"),
        ({"a.npy": claims((1 << 40, 1 << 40))}, "an array that says it is"),
        ({"a.npy": claims((-4,))}, "an array that says it is"),
        ({"a.npy": b"\x93NUMPY\x09\x00" + bytes(20)}, r"magic|format"),
        ({"a.npy": pickle.dumps(Hostile())}, "is no .npz of embeddings"),
        ({"a.npy": b""}, "is no .npz of embeddings"),
        ({"a.npy": npy(np.float32(3))}, r"'a' in .* is an array of shape \(\)"),
        ({"a.npy": npy(np.zeros((0, 4), np.float32))}, r"is an array of shape \(0, 4\)"),
        ({"a.npy": npy(np.zeros((2, 3, 4), np.float32))}, r"is an array of shape \(2, 3, 4\)"),
        ({"a.npy": npy(A), "b.npy": npy(A[:3])}, "'b' in .* is 3 wide, and those before it 4"),
        ({"a.npy": npy(np.array([1, np.nan]))}, "'a' in .* has values that are not finite"),
        ({"a.npy": npy(np.array([1e300]))}, "'a' in .* has values that are not finite"),
    ],
)
def test_an_npz_of_something_else(tmp_path: Path, members: dict[str, bytes], message: str):
    with zipfile.ZipFile(tmp_path / "o.npz", "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    with pytest.raises(StorageError, match=message) as error:
        list(read_npz(tmp_path / "o.npz"))
    assert "o.npz" in one_line(error)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_npz_with_an_id_twice(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "o.npz", "w") as file:
        for _ in range(2):
            file.writestr("a.npy", npy(A))
    with pytest.raises(StorageError, match=r"holds 'a\.npy', twice"):
        list(read_npz(tmp_path / "o.npz"))


def test_an_npz_that_unpacks_to_more_than_it_says(tmp_path: Path):
    path = tmp_path / "o.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", npy(np.zeros(1 << 20, np.float32)))
    with zipfile.ZipFile(path) as file:
        size = file.infolist()[0].file_size.to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (144).to_bytes(4, "little")))
    with pytest.raises(StorageError, match=r"is no \.npz of embeddings"):
        list(read_npz(path))


def test_every_cut_and_many_flips_of_an_npz_are_an_error_or_harmless(tmp_path: Path):
    saved(tmp_path / "o.npz", make(2), ["x", "y"])
    data = (tmp_path / "o.npz").read_bytes()
    whole = [f.array.tobytes() for f in read_npz(tmp_path / "o.npz")]
    path = tmp_path / "damaged.npz"
    rng = np.random.default_rng(0)
    for cut in rng.integers(0, len(data), 50):
        path.write_bytes(data[:cut])
        with pytest.raises(StorageError):
            list(read_npz(path))
    for position in rng.integers(0, len(data), 300):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            found = [f.array.tobytes() for f in read_npz(path)]
        except StorageError:
            continue
        assert found == whole


@pytest.mark.parametrize("read", [read_npz, read_pt])
def test_what_is_not_there(tmp_path: Path, read: Callable[[Path], Any]):
    with pytest.raises(StorageError, match="nowhere"):
        list(read(tmp_path / "nowhere"))


@pytest.mark.parametrize("pooling", ["mean", "cls", "per_residue"])
def test_a_fair_esm_folder_that_was_exported_comes_back(tmp_path: Path, pooling: str):
    expected = saved(tmp_path / "o.pt", make(len(IDS), pooling=pooling), IDS)
    found = list(read_pt(tmp_path / "o.pt"))
    assert sorted(f.id for f in found) == sorted(IDS)
    for f in found:
        assert (f.layer, f.pooling) == (2, pooling)
        assert f.array.tobytes() == expected[f.id].tobytes()


def test_a_folder_of_extracts_own(tmp_path: Path):
    """Several layers and kinds a file, whole headers for labels, a folder below where one has a slash, contacts."""
    rows = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    layers = {5: rows, 6: rows + 1}
    value = {
        "label": "sp|P1|A_B Some protein OS=x/y",
        "representations": layers,
        "mean_representations": {layer: t.mean(0) for layer, t in layers.items()},
        "bos_representations": {6: rows[0].half()},
        "contacts": torch.zeros(3, 3),
    }
    (tmp_path / "sp|P1|A_B Some protein OS=x").mkdir()
    torch.save(value, tmp_path / "sp|P1|A_B Some protein OS=x" / "y.pt")
    torch.save({"label": "q", "mean_representations": {6: rows[1].bfloat16()}}, tmp_path / "q.pt")
    found = {(f.id, f.pooling, f.layer): f for f in read_pt(tmp_path)}
    first = "sp|P1|A_B"
    assert set(found) == {
        ("q", "mean", 6), (first, "mean", 5), (first, "mean", 6), (first, "per_residue", 5), (first, "per_residue", 6),
        (first, "cls", 6),
    }  # fmt: skip
    assert all(isinstance(f, Imported) and f.array.dtype == np.float32 for f in found.values())
    assert np.array_equal(found[first, "per_residue", 6].array, rows.numpy() + 1)
    assert np.array_equal(found["q", "mean", 6].array, rows[1].numpy())


def means(tensor: Any) -> dict[str, Any]:
    return {"label": "x", "mean_representations": {6: tensor}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (T, "has no label"),
        ([1], "has no label"),
        ({"mean_representations": {6: T}}, "has no label"),
        ({"label": " ", "mean_representations": {6: T}}, "has no label"),
        ({"label": 3, "mean_representations": {6: T}}, "has no label"),
        ({"label": "x"}, "holds no representations"),
        ({"label": "x", "contacts": T}, "holds no representations"),
        ({"label": "x", "mean_representations": T}, "mean_representations that are not by layer"),
        ({"label": "x", "mean_representations": {"6": T}}, "not by layer"),
        ({"label": "x", "mean_representations": {-1: T}}, "not by layer"),
        ({"label": "x", "mean_representations": {True: T}}, "not by layer"),
        (means([1.0]), "no tensor of floating-point numbers"),
        (means(torch.arange(4)), "no tensor of floating-point numbers"),
        (means(T.to_sparse()), "no tensor of floating-point numbers"),
        (means(torch.empty(4, device="meta")), "no tensor of floating-point numbers"),
        (means(torch.zeros(1).expand(1 << 40)), "no tensor of floating-point numbers"),
        (means(T.reshape(2, 2)), r"holds \(2, 2\) as mean_representations"),
        ({"label": "x", "representations": {6: T}}, r"holds \(4,\) as representations"),
        (means(torch.zeros(0)), r"is an array of shape \(0,\)"),
        (means(torch.tensor([1, torch.inf])), "not finite"),
        (means(torch.tensor(1.0)), r"shape \(\)"),
        ({"label": "x", "mean_representations": {6: T, 7: T[:3]}}, "is 3 wide, and those before it 4"),
        (means(Hostile()), "can't be read without running its code"),
        ({"label": Hostile()}, "can't be read without running its code"),
    ],
)
def test_a_pt_of_something_else(tmp_path: Path, value: Any, message: str):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(StorageError, match=message) as error:
        list(read_pt(tmp_path))
    assert "x.pt" in one_line(error)


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"no pickle", pickle.dumps(Hostile()), pickle.dumps({"label": "x"})]
)
def test_a_pt_that_torch_did_not_write(tmp_path: Path, data: bytes):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(StorageError, match=r"x\.pt (can't be read without running its code|holds no)") as error:
        list(read_pt(tmp_path))
    one_line(error)


def test_a_compressed_pt_is_not_unpacked(tmp_path: Path):
    torch.save(means(T), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    with pytest.raises(StorageError, match="it is compressed"):
        list(read_pt(tmp_path))


def test_two_files_of_one_id_and_folders_without_any(tmp_path: Path):
    with pytest.raises(StorageError, match=r"holds no \.pt files; give a folder of ID\.pt"):
        list(read_pt(tmp_path))
    for name in ("a.pt", "b.pt"):
        torch.save(means(T), tmp_path / name)
    with pytest.raises(StorageError, match=r"b\.pt and .*a\.pt are both of 'x'; remove one"):
        list(read_pt(tmp_path))


def test_a_model_is_no_folder_of_embeddings(tmp_path: Path):
    torch.save({"args": 1, "model": {"encoder.weight": T}}, tmp_path / "esm2.pt")
    with pytest.raises(StorageError, match=r"esm2\.pt has no label; give a folder of ID\.pt"):
        list(read_pt(tmp_path))
    with pytest.raises(StorageError, match=r"esm2\.pt is no folder"):
        list(read_pt(tmp_path / "esm2.pt"))
