"""The manifest: what an embed stage made, in a small file whose bytes change when a number does.

It holds content hashes, not vectors; those are in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.embedder import Embedded
from proteus_pipeline.embeddings.stored import to_fp32
from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.stores.files import storage_error, write_atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = 1
DEFAULT_CACHE = ".proteus/cache"


@dataclass(frozen=True)
class Manifest:
    """A list of embeddings by sequence id, all by the same weights and recipe."""

    trunk: str
    recipe: dict[str, Any]
    ids: tuple[str, ...]
    entries: tuple[Embedded, ...]


def write_manifest(
    path: Path, trunk: str, recipe: dict[str, Any], ids: Sequence[str], entries: Sequence[Embedded]
) -> None:
    """Write a manifest, one sequence a line: the same bytes for the same numbers."""
    head = json.dumps({"format": FORMAT, "trunk": trunk, "recipe": recipe}, sort_keys=True)
    rows = [
        json.dumps({"id": i, "key": e.key, "shape": list(e.shape), "dtype": e.stored, "content": e.content})
        for i, e in zip(ids, entries, strict=True)
    ]
    text = f'{head[:-1]}, "sequences": [\n' + ",\n".join(rows) + "\n]}\n"
    write_atomic(path, text.encode())


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises
    ------
    StorageError
        When there is none, or it can't be read.
    IntegrityError
        When it is damaged or of another format.

    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist", "run: dvc repro embed") from error
    except OSError as error:
        raise storage_error("read", path, error) from error
    try:
        value = json.loads(data)
        if value["format"] != FORMAT:
            raise IntegrityError(
                f"{path} has format {value['format']}, and this proteus reads {FORMAT}", "run: dvc repro embed"
            )
        rows = value["sequences"]
        entries = tuple(Embedded(r["key"], tuple(r["shape"]), r["dtype"], r["content"]) for r in rows)
        return Manifest(value["trunk"], value["recipe"], tuple(r["id"] for r in rows), entries)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is damaged ({error})", "run: dvc repro --force --single-item embed") from error


def load_embeddings(
    manifest: str | Path, cache: str | Path | EmbeddingCache | None = None
) -> tuple[list[str], list[NDArray[np.float32]]]:
    """Return what a manifest lists: ids, and their embeddings as fp32, (D,) or (L, D) each.

    Parameters
    ----------
    manifest
        Such as ``results/embeddings.json``.
    cache
        The embedding cache; by default ``.proteus/cache`` in the manifest's folder or the nearest one above it.

    Raises
    ------
    StorageError
        When an embedding is not in the cache, or another one is there in its place.
    IntegrityError
        When it is there and damaged.

    """
    path = Path(manifest)
    listed = read_manifest(path)
    store = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache or _nearest_cache(path))
    wanted = {e.key: e.content for e in listed.entries}
    found: dict[str, NDArray[np.float32]] = {}
    damage: StorageError | None = None
    for key, entries in store.candidates(list(wanted)).items():
        # The manifest means these bits: an entry of another device class may hold others.
        for entry in entries:
            if entry.content == wanted[key]:
                try:
                    found[key] = to_fp32(store.read(entry), entry.stored)
                except StorageError as error:
                    damage = error  # the same bits may be stored a second time
                    continue
                break
    if missing := [i for i, e in zip(listed.ids, listed.entries, strict=True) if e.key not in found]:
        kind = IntegrityError if isinstance(damage, IntegrityError) else StorageError
        raise kind(
            f"{len(missing)} of {len(listed.ids)} embeddings of {path} are not in {store.path}, {missing[0]} first",
            "run: dvc repro --force --single-item embed",
        ) from damage
    return list(listed.ids), [found[e.key] for e in listed.entries]


def _nearest_cache(path: Path) -> Path:
    parents = path.resolve().parents
    return next((p / DEFAULT_CACHE for p in parents if (p / DEFAULT_CACHE).is_dir()), parents[0] / DEFAULT_CACHE)
