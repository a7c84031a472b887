"""What each format's own library finds in an export, besides the values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from entries import TRUNK, make
from exported import IDS, provenance, saved

from proteus_pipeline.embeddings import selection


def test_anndata(tmp_path: Path):
    import anndata

    made = make(len(IDS), stored="fp16")
    expected = saved(tmp_path / "o.h5ad", made, IDS)
    for backed in (None, "r"):
        data = anndata.read_h5ad(tmp_path / "o.h5ad", backed=backed)
        assert data.shape == (len(IDS), 8)
        assert list(data.obs_names) == IDS
        assert data.X.dtype == np.float32
        assert np.array_equal(data.X[:], np.stack(list(expected.values())))
        assert np.array_equal(data[IDS[7]].X[:].ravel(), expected[IDS[7]])
        told = data.uns["proteus"]
        assert (told["format"], told["model"], told["trunk"]) == (1, "m@v1.0.0", TRUNK)
        recipe = {k: v for k, v in made.recipe.identity(0).items() if v is not None}
        assert {k: v.item() if isinstance(v, np.generic) else v for k, v in told["recipe"].items()} == recipe
        if backed:
            data.file.close()


@pytest.mark.parametrize("pooling", ["mean", "per_residue"])
def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: str):
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(selection, "BATCH_BYTES", 1000)
    made = make(100, pooling=pooling)
    expected = saved(tmp_path / "o.parquet", made, [f"id{n}" for n in range(100)])
    table = pq.read_table(tmp_path / "o.parquet")
    vector = pa.list_(pa.float32(), 8)
    assert table.schema.names == ["id", "embedding"]
    assert table.schema.field("id").type == pa.string()
    assert table.schema.field("embedding").type == (vector if pooling == "mean" else pa.list_(vector))
    assert json.loads(table.schema.metadata[b"proteus"]) == provenance(made)
    assert pq.ParquetFile(tmp_path / "o.parquet").num_row_groups > 3
    frame = pd.read_parquet(tmp_path / "o.parquet").set_index("id")
    for name, array in expected.items():
        assert np.array_equal(np.stack(list(frame.loc[name, "embedding"])), array)
    if pooling == "mean":
        matrix = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 8)
        assert np.array_equal(matrix, np.stack(list(expected.values())))


@pytest.mark.parametrize("pooling", ["mean", "per_residue"])
def test_hdf5_is_as_bio_embeddings_writes_it(tmp_path: Path, pooling: str):
    import h5py

    made = make(12, pooling=pooling)
    long = "x" * 100_000  # an attribute in the file's own header holds 64 KiB
    expected = saved(tmp_path / "o.h5", made, [*IDS[:10], "a/b", long])
    with h5py.File(tmp_path / "o.h5") as file:
        assert list(file) == [str(n) for n in range(12)]
        assert all(list(dataset.attrs) == ["original_id"] for dataset in file.values())
        assert all(dataset.dtype == np.float32 for dataset in file.values())
        # As biotrainer and others read such files.
        found = {file[index].attrs["original_id"]: np.array(dataset) for index, dataset in file.items()}
        assert (file.attrs["model"], file.attrs["trunk"]) == ("m@v1.0.0", TRUNK)
        assert json.loads(file.attrs["recipe"]) == made.recipe.identity(0)
        assert json.loads(file.attrs["format"]) == 1
    assert list(found) == list(expected)
    assert all(np.array_equal(found[i], a) for i, a in expected.items())


@pytest.mark.parametrize(
    ("pooling", "field"),
    [("mean", "mean_representations"), ("cls", "bos_representations"), ("per_residue", "representations")],
)
def test_a_fair_esm_folder_is_as_extract_writes_it(tmp_path: Path, pooling: str, field: str):
    import torch

    expected = saved(tmp_path / "o.pt", make(2, pooling=pooling), ["sp|P1|A_B", "NP_0001.1"])
    assert sorted(p.name for p in (tmp_path / "o.pt").iterdir()) == ["NP_0001.1.pt", "sp|P1|A_B.pt"]
    for name, array in expected.items():
        value = torch.load(tmp_path / "o.pt" / f"{name}.pt", weights_only=True)
        assert list(value) == ["label", field]
        assert value["label"] == name
        assert list(value[field]) == [2]
        tensor = value[field][2]
        assert tensor.dtype == torch.float32
        assert tensor.untyped_storage().nbytes() == array.nbytes  # no view into more
        assert np.array_equal(tensor.numpy(), array)


def test_zarr(tmp_path: Path):
    import zarr

    made = make(3)
    expected = saved(tmp_path / "o.zarr", made, ["x", "y", "z"])
    group = zarr.open_group(tmp_path / "o.zarr", mode="r")
    assert group.attrs["ids"] == ["x", "y", "z"]
    assert group.attrs["proteus"] == provenance(made)
    assert np.array_equal(group["embeddings"][:], np.stack(list(expected.values())))


def test_a_zarr_of_several_chunks_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import zarr

    monkeypatch.setattr(selection, "BATCH_BYTES", 1_100_000)
    expected = saved(tmp_path / "o.zarr", make(40, width=20_000), [str(n) for n in range(40)])
    array = zarr.open_group(tmp_path / "o.zarr", mode="r")["embeddings"]
    assert array.chunks == (13, 20_000)
    assert np.array_equal(array[:], np.stack(list(expected.values())))
