"""Embeddings in a file of their own, by sequence id, for other programs."""

from __future__ import annotations

import importlib.util
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings import writers
from proteus_pipeline.embeddings.computing import Embedded
from proteus_pipeline.embeddings.selection import Selection
from proteus_pipeline.errors import ConfigError, StorageError
from proteus_pipeline.models.pooling import POOLINGS
from proteus_pipeline.sequences.fasta import shown
from proteus_pipeline.stores.files import TEMPORARY_PREFIX, atomic_path, storage_error

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.embeddings.writers import Writer

FORMAT = 1
"""Of what `export` writes, where its provenance says so."""
_NPZ_NAME_BYTES = 65_535  # zip has 16 bits for the length of a name
_FILE_NAME_BYTES = 255


@dataclass(frozen=True)
class Kind:
    """One kind of export.

    Attributes
    ----------
    write
        Its writer.
    folder
        Whether it is a folder, and not a file.
    library
        What the extra ``export`` brings and it needs; else empty.
    poolings
        Those that it has a place for.
    id_bytes
        How long, in UTF-8, an id may be; 0 for any length.
    file_names
        Whether an id must be safe as a file's name.

    """

    write: Writer
    folder: bool = False
    library: str = ""
    poolings: tuple[str, ...] = tuple(POOLINGS)
    id_bytes: int = 0
    file_names: bool = False


KINDS = {
    ".h5": Kind(writers.write_h5, library="h5py"),
    ".h5ad": Kind(writers.write_h5ad, library="anndata", poolings=tuple(p for p in POOLINGS if p != "per_residue")),
    ".parquet": Kind(writers.write_parquet, library="pyarrow"),
    ".pt": Kind(
        writers.write_pt,
        folder=True,
        poolings=tuple(writers.FAIR_ESM_FIELDS),
        id_bytes=_FILE_NAME_BYTES - len(".pt"),
        file_names=True,
    ),
    ".npz": Kind(writers.write_npz, id_bytes=_NPZ_NAME_BYTES - len(".npy")),
    ".zarr": Kind(writers.write_zarr, folder=True),
}


def check_target(path: Path, pooling: str = "", ids: Iterable[str] = ()) -> None:
    """Make sure that embeddings can be written to `path`, as far as is known, before anything is computed.

    Parameters
    ----------
    path
        A file, or for ``.zarr`` and ``.pt`` a folder.
    pooling
        As in a recipe; empty where it is not known yet.
    ids
        What they will be called.

    Raises
    ------
    ConfigError
        For a kind of file that is not known, or has no place for embeddings of this pooling, or needs a library that
        is not installed.
    StorageError
        When its folder does not exist, there is something else at `path`, or the kind can't hold one of the ids.

    """
    kind = KINDS.get(path.suffix)
    if kind is None:
        *most, last = KINDS
        raise ConfigError(
            f"{path} is no kind of file to write embeddings to", f"end its name in {', '.join(most)} or {last}"
        )
    if kind.library and importlib.util.find_spec(kind.library) is None:
        raise ConfigError(
            f"writing {path} needs {kind.library}, which is not installed", "pip install 'proteus_pipeline[export]'"
        )
    if pooling and pooling not in kind.poolings:
        others = " or ".join(suffix for suffix, other in KINDS.items() if pooling in other.poolings)
        raise ConfigError(
            f"a {path.suffix} has no place for {pooling} embeddings",
            f"write to a {others}, or use embedding.pooling={kind.poolings[0]}",
        )
    if not path.parent.is_dir():
        raise StorageError(f"{path.parent} does not exist", "create it first")
    if path.exists() and path.is_dir() != kind.folder:
        found, wanted = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise StorageError(f"{path} is {found}, and a {path.suffix} export is {wanted}", "choose another name")
    # A folder of models may be called so too: what is replaced is an export, or nothing.
    if path.suffix == ".pt" and path.is_dir() and (other := _first_other(path)):
        raise StorageError(f"{path} holds {other}, which no export wrote", "choose another name, or remove the folder")
    for i in ids:
        _check_id(i, path.suffix, kind)


def _first_other(folder: Path) -> str:
    return next((p.name for p in folder.iterdir() if p.suffix != ".pt" or not p.is_file()), "")


def _check_id(i: str, suffix: str, kind: Kind) -> None:
    if kind.id_bytes and len(i) * 4 > kind.id_bytes and (found := len(i.encode())) > kind.id_bytes:
        raise StorageError(
            f"the id {shown(i)} has {found:,} bytes, and a {suffix} holds at most {kind.id_bytes:,}",
            "write to a .zarr instead",
        )
    if kind.file_names and (not i or i.startswith(".") or set(i) & set("/\\\0")):
        raise StorageError(
            f"the id {shown(i)} can't be a file's name, and in a {suffix} it is one", "write to a .h5 or .zarr instead"
        )


def export(
    path: Path,
    cache: EmbeddingCache,
    ids: Sequence[str],
    entries: Sequence[Embedded],
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write embeddings as fp32, by id: (D,) or (L, D) each. What was at `path` is replaced at the end.

    ``.npz``
        One array an id.
    ``.zarr``
        A group: ``ids`` in its attributes; ``embeddings``, an (N, D) array, or a group of one array an id.
    ``.h5ad``
        AnnData: ids as obs_names, X (N, D).
    ``.parquet``
        The columns ``id`` and ``embedding``.
    ``.h5``
        As bio_embeddings writes it: a dataset an id, with the attribute ``original_id``.
    ``.pt``
        A folder of ID.pt, each as fair-esm's extract.py writes it.

    All but ``.h5ad``, whose X is one array, are written a few embeddings at a time.

    Parameters
    ----------
    path
        Its suffix says what to write.
    cache
        Where the embeddings are.
    ids, entries
        Which embedding each id has.
    provenance
        How they came to be: ``format``, ``model``, ``trunk``, ``recipe``, of JSON's kinds of values. It is written
        where the format has a place for it; a ``.pt`` takes the layer and the pooling from its recipe.

    Raises
    ------
    ConfigError
        As `check_target`.
    StorageError
        As `check_target`, and when an embedding is gone from the cache or the file can't be written.

    """
    selection, told = Selection(cache, ids, entries), provenance or {}
    pooling = str(told.get("recipe", {}).get("pooling", "" if selection.pooled else "per_residue"))
    check_target(path, pooling, ids)
    kind = KINDS[path.suffix]
    place: Callable[[Path], Any] = _new_folder if kind.folder else atomic_path
    with place(path) as temporary:
        try:
            kind.write(temporary, selection, told)
        except StorageError:  # an OSError too
            raise
        except OSError as error:
            raise storage_error("write", path, error) from error


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield the name of a folder for the body to make; put it in the place of `path` when the body succeeds."""
    # Names of this export's own: another one to the same path, at the same time, is not in its way.
    token = secrets.token_hex(8)
    temporary, former = (path.with_name(f"{TEMPORARY_PREFIX}{token}{kind}{path.suffix}") for kind in ("", "-old"))
    try:
        yield temporary
        try:
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
