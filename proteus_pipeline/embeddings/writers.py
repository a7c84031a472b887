"""Embeddings as other programs read them: one function a format.

Each writes a selection, as fp32, to a path where nothing is yet; `provenance`, which is JSON's kinds of values by name,
goes where the format has a place for it. What fails raises OSError. `proteus_pipeline.embeddings.export` gives the
paths, and puts the finished file or folder into its place.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings.selection import Selection
from proteus_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    Writer = Callable[[Path, Selection, Mapping[str, Any]], None]

PROVENANCE = "proteus"
"""The name that provenance has where a format's other names are the user's or another program's."""
FAIR_ESM_FIELDS = {"mean": "mean_representations", "per_residue": "representations", "cls": "bos_representations"}
"""By pooling, what fair-esm's extract.py calls it in its files."""
_ZARR_CHUNK_BYTES = 1 << 20


def write_npz(path: Path, selection: Selection, _provenance: Mapping[str, Any]) -> None:
    """Write one array an id. The format has no place for provenance: another name would be another id."""
    import numpy as np

    # What np.savez writes; as its keyword arguments, ids such as "file" would clash with its own.
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True) as file:
        for name, array in selection:
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_zarr(path: Path, selection: Selection, provenance: Mapping[str, Any]) -> None:
    """Write a group: ``ids`` and ``proteus`` in its attributes; ``embeddings``, (N, D) or a group of arrays 0, 1, ..."""
    import numpy as np
    import zarr

    group = zarr.open_group(path, mode="w-")
    group.attrs["ids"] = list(selection.ids)
    if provenance:
        group.attrs[PROVENANCE] = dict(provenance)
    if selection.pooled:
        shape = (len(selection), selection.width)
        rows = max(1, min(len(selection), _ZARR_CHUNK_BYTES // (4 * selection.width)))
        target = group.create_array("embeddings", shape=shape, chunks=(rows, selection.width), dtype="float32")
        start = 0
        for batch in selection.batches():
            target[start : start + len(batch)] = np.stack([array for _, array in batch])
            start += len(batch)
    else:
        inner = group.create_group("embeddings")
        for number, (_, array) in enumerate(selection):
            # Ids may hold any character; a number is a safe name, and ids has the order.
            inner.create_array(str(number), data=array)


def write_h5ad(path: Path, selection: Selection, provenance: Mapping[str, Any]) -> None:
    """Write an AnnData: ids as obs_names, X (N, D), provenance in ``uns["proteus"]``."""
    import anndata
    import h5py
    import numpy as np
    import pandas as pd

    values = np.empty((len(selection), selection.width), dtype=np.float32)
    for row, (_, array) in enumerate(selection):
        values[row] = array
    data = anndata.AnnData(values, obs=pd.DataFrame(index=pd.Index(list(selection.ids), dtype=object)))
    if provenance:
        data.uns[PROVENANCE] = _without_nulls(provenance)
    # Through a file of Python's, an error of the disk comes out as the OSError that it was.
    with path.open("x+b") as stream, h5py.File(stream, "w") as file:
        anndata.io.write_elem(file, "/", data)


def _without_nulls(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what AnnData before 0.12 has no word for."""
    return {
        name: _without_nulls(value) if isinstance(value, Mapping) else value
        for name, value in mapping.items()
        if value is not None
    }


def write_parquet(path: Path, selection: Selection, provenance: Mapping[str, Any]) -> None:
    """Write the columns ``id`` and ``embedding``, a list of D floats, or of L such lists; a row group a batch.

    Provenance is JSON in the schema's metadata, under ``proteus``.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = pa.list_(pa.float32(), selection.width)
    schema = pa.schema([
        pa.field("id", pa.string(), nullable=False),
        pa.field("embedding", row if selection.pooled else pa.list_(row), nullable=False),
    ])  # fmt: skip
    if provenance:
        schema = schema.with_metadata({PROVENANCE: json.dumps(provenance, sort_keys=True)})
    with (
        path.open("xb") as stream,
        pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        for batch in selection.batches():
            arrays = [array for _, array in batch]
            flat = pa.array(np.concatenate(arrays, axis=None))
            column = pa.FixedSizeListArray.from_arrays(flat, type=row)
            if not selection.pooled:
                offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
                column = pa.ListArray.from_arrays(offsets, column, type=schema.field("embedding").type)
            names = pa.array([name for name, _ in batch], pa.string())
            writer.write_table(pa.table([names, column], schema=schema), row_group_size=len(batch))


def write_h5(path: Path, selection: Selection, provenance: Mapping[str, Any]) -> None:
    """Write HDF5 in bio_embeddings' layout: a dataset a sequence, called 0, 1, ..., with its id as ``original_id``.

    Each name of the provenance is an attribute of the file: a text as it is, another value as JSON.
    """
    import h5py

    with path.open("x+b") as stream, h5py.File(stream, "w", track_order=True) as file:
        for name, value in provenance.items():
            file.attrs[name] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for number, (name, array) in enumerate(selection):
            file.create_dataset(str(number), data=array).attrs["original_id"] = name


def write_pt(path: Path, selection: Selection, provenance: Mapping[str, Any]) -> None:
    """Write a folder of ID.pt files, each as fair-esm's extract.py writes it.

    Raises
    ------
    ConfigError
        When the provenance has no ``recipe`` that says which layer and pooling this is.

    """
    import torch

    try:
        layer, field = int(provenance["recipe"]["layer"]), FAIR_ESM_FIELDS[provenance["recipe"]["pooling"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "fair-esm's files say which layer and pooling they hold", "give provenance={'recipe': {...}} with both"
        ) from error
    path.mkdir()
    for name, array in selection:
        # torch.save's own errors do not say what was wrong with the disk.
        buffer = io.BytesIO()
        torch.save({"label": name, field: {layer: torch.from_numpy(array)}}, buffer)
        with (path / f"{name}.pt").open("xb") as file:
            file.write(buffer.getbuffer())
