"""Exports of made-up entries, and how each format's own library reads them; for tests of several files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from entries import TRUNK, Made, publish

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.computing import Embedded
from proteus_pipeline.embeddings.export import export
from proteus_pipeline.embeddings.stored import content_hash, to_fp32

SUFFIXES = [".npz", ".zarr", ".h5", ".h5ad", ".parquet", ".pt"]
# Names that np.savez keeps for itself, that look like paths, and that no ASCII holds.
IDS = ["sp|P69905|HBA_HUMAN", "file", "arr_0", "args", "allow_pickle", "kwds", "self", "é蛋白", "x.y", "ids", "10", "9"]
PATHS = ["a/b/c", "../up", ".hidden"]


def saved(path: Path, made: Made, ids: list[str]) -> dict[str, np.ndarray]:
    """Export what was made, through a cache beside `path`; return what is expected there."""
    cache = EmbeddingCache(path.parent / "cache")
    publish(cache, made)
    export(path, cache, ids, embedded(made), provenance(made))
    return {i: to_fp32(a, made.recipe.stored) for i, a in zip(ids, made.arrays.values(), strict=True)}


def embedded(made: Made) -> list[Embedded]:
    stored = made.recipe.stored
    return [Embedded(key, a.shape, stored, content_hash(a, stored)) for key, a in made.arrays.items()]


def provenance(made: Made) -> dict[str, Any]:
    return {"format": 1, "model": "m@v1.0.0", "trunk": TRUNK, "recipe": made.recipe.identity(0)}


def opened(path: Path) -> dict[str, np.ndarray]:
    """Return an export's arrays by id, in its order where it has one."""
    return {
        ".npz": _npz,
        ".zarr": _zarr,
        ".h5": _h5,
        ".h5ad": _h5ad,
        ".parquet": _parquet,
        ".pt": _pt,
    }[path.suffix](path)


def _npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _zarr(path: Path) -> dict[str, np.ndarray]:
    import zarr

    group = zarr.open_group(path, mode="r")
    node = group["embeddings"]
    ids = group.attrs["ids"]
    assert isinstance(ids, list)
    return {i: node[n if isinstance(node, zarr.Array) else str(n)][...] for n, i in enumerate(ids)}


def _h5(path: Path) -> dict[str, np.ndarray]:
    import h5py

    with h5py.File(path) as file:
        return {dataset.attrs["original_id"]: dataset[...] for dataset in file.values()}


def _h5ad(path: Path) -> dict[str, np.ndarray]:
    import anndata

    data = anndata.read_h5ad(path)
    return dict(zip(data.obs_names, data.X, strict=True))


def _parquet(path: Path) -> dict[str, np.ndarray]:
    import pandas as pd

    frame = pd.read_parquet(path)
    return {i: np.stack(a) if a.dtype == object else a for i, a in zip(frame["id"], frame["embedding"], strict=True)}


def _pt(path: Path) -> dict[str, np.ndarray]:
    import torch

    found = {}
    for file in path.iterdir():
        value = torch.load(file, weights_only=True)
        (field,) = value.keys() - {"label"}
        ((layer, tensor),) = value[field].items()
        assert file.name == f"{value['label']}.pt"
        assert type(layer) is int and layer == 2
        found[value["label"]] = tensor.numpy()
    return found
