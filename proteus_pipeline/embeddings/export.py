"""Embeddings in a file of their own, by sequence id."""

from __future__ import annotations

import secrets
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.embedder import Embedded
from proteus_pipeline.embeddings.stored import to_fp32
from proteus_pipeline.errors import ConfigError, StorageError
from proteus_pipeline.sequences.fasta import shown
from proteus_pipeline.stores.files import TEMPORARY_PREFIX, atomic_path, storage_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS = (".npz", ".zarr")
_NPZ_NAME_BYTES = 65_535  # zip has 16 bits for the length of a name


def check_target(path: Path) -> None:
    """Make sure that `path` can be written, before anything is computed.

    Raises
    ------
    ConfigError
        For a kind of file that is not known.
    StorageError
        When its folder does not exist.

    """
    if path.suffix not in KINDS:
        raise ConfigError(f"{path} is no kind of file to write embeddings to", f"end its name in {' or '.join(KINDS)}")
    if not path.parent.is_dir():
        raise StorageError(f"{path.parent} does not exist", "create it first")


def export(path: Path, cache: EmbeddingCache, ids: Sequence[str], entries: Sequence[Embedded]) -> None:
    """Write embeddings as fp32, by id: (D,) or (L, D) each.

    A ``.npz`` holds one array an id. A ``.zarr`` group holds ``ids`` in its attributes and, pooled, one (N, D) array
    ``embeddings``; per residue, one array an id in the group ``embeddings``. What was at `path` is replaced at the end.

    Raises
    ------
    StorageError
        When an embedding is gone from the cache, an id is too long for a ``.npz``, or the file can't be written.

    """
    if path.suffix == ".npz":
        _check_names(ids)
    by_key = {entry.key: to_fp32(array, entry.stored) for entry, array in cache.find(e.key for e in entries)}
    if missing := [i for i, e in zip(ids, entries, strict=True) if e.key not in by_key]:
        raise StorageError(f"the embedding of {missing[0]} is gone from {cache.path}", "run the command again")
    arrays = {i: by_key[e.key] for i, e in zip(ids, entries, strict=True)}
    if path.suffix == ".npz":
        _write_npz(path, arrays)
    else:
        _write_zarr(path, arrays)


def _check_names(ids: Sequence[str]) -> None:
    longest = _NPZ_NAME_BYTES - len(".npy")
    for i in ids:
        if len(i) * 4 > longest and (found := len(i.encode())) > longest:
            raise StorageError(
                f"the id {shown(i)} has {found:,} bytes, and a .npz holds at most {longest:,}",
                "write to a .zarr instead",
            )


def _write_npz(path: Path, arrays: dict[str, NDArray[np.float32]]) -> None:
    import numpy as np

    # What np.savez writes; as its keyword arguments, ids such as "file" would clash with its own.
    with atomic_path(path) as temporary:
        try:
            with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED, allowZip64=True) as file:
                for name, array in arrays.items():
                    with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
        except OSError as error:
            raise storage_error("write", path, error) from error


def _write_zarr(path: Path, arrays: dict[str, NDArray[np.float32]]) -> None:
    import numpy as np
    import zarr

    # Names of this export's own: another one to the same path, at the same time, is not in its way.
    token = secrets.token_hex(8)
    temporary, former = (path.with_name(f"{TEMPORARY_PREFIX}{token}{kind}{path.suffix}") for kind in ("", "-old"))
    try:
        group = zarr.open_group(temporary, mode="w-")
        group.attrs["ids"] = list(arrays)
        if next(iter(arrays.values())).ndim == 1:
            group.create_array("embeddings", data=np.stack(list(arrays.values())))
        else:
            inner = group.create_group("embeddings")
            for number, array in enumerate(arrays.values()):
                # Ids may hold any character; a number is a safe name, and ids has the order.
                inner.create_array(str(number), data=array)
        # A folder can't be renamed over another: the former one is set aside whole, and removed at the end.
        if path.exists():
            path.rename(former)
        temporary.rename(path)
    except OSError as error:
        raise StorageError(
            f"{path} can't be written ({error.strerror})", "free space, or choose another place"
        ) from error
    finally:
        if former.exists() and not path.exists():
            former.rename(path)
        for folder in (temporary, former):
            shutil.rmtree(folder, ignore_errors=True)
