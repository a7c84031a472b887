"""Entries that follow from stored ones without the model, bit for bit as they would be computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from proteus_pipeline.embeddings.stored import to_fp32, to_stored
from proteus_pipeline.errors import StorageError
from proteus_pipeline.models.pooling import pool_residues

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.embeddings.found import Entry
    from proteus_pipeline.embeddings.recipe import Recipe


class Derived(NamedTuple):
    """An embedding in its stored dtype, and the entry that it was derived from."""

    key: str
    array: NDArray[np.generic]
    start: NDArray[np.generic] | None
    source: Entry


def sources(recipe: Recipe) -> list[Recipe]:
    """Return the recipes whose entries decide this one's bits, those that are least to read first.

    Rounding is monotonic, so that the greatest of rounded residues is the greatest rounded; a mean of rounded residues is
    not the mean rounded. ``attention`` needs weights that nobody stores.
    """
    found = []
    if recipe.stored != "fp32":
        found.append(replace(recipe, stored="fp32"))
    if recipe.pooling in {"max", "cls"}:
        found.append(replace(recipe, pooling="per_residue"))
    if recipe.pooling in {"max", "cls", "mean"}:
        found.append(replace(recipe, pooling="per_residue", stored="fp32"))
    return list(dict.fromkeys(found))


def derive(cache: EmbeddingCache, trunk: str, recipe: Recipe, missing: Mapping[str, str]) -> Iterator[Derived]:
    """Yield what can be derived of the embeddings that are missing.

    Parameters
    ----------
    cache
        Where stored entries lie.
    trunk, recipe
        What is asked for.
    missing
        Sequences by key.

    Raises
    ------
    ProteusError
        When a value does not fit into the stored dtype, as when it is computed.

    """
    left = dict(missing)
    for source in sources(recipe):
        keys = {source.key(trunk, sequence): key for key, sequence in left.items()}
        for entry, array in cache.find(keys):
            derived = _from(cache, entry, array, source, recipe)
            if derived is not None:
                del left[keys[entry.key]]
                yield Derived(keys[entry.key], *derived, entry)


def _from(
    cache: EmbeddingCache, entry: Entry, array: NDArray[np.generic], source: Recipe, recipe: Recipe
) -> tuple[NDArray[np.generic], NDArray[np.generic] | None] | None:
    values = to_fp32(array, entry.stored)
    if recipe.pooling == source.pooling == "per_residue":
        start = _start(cache, entry)
        return to_stored(values, recipe.stored), None if start is None else to_stored(start, recipe.stored)
    if recipe.pooling == source.pooling:
        return to_stored(values, recipe.stored), None
    if recipe.pooling == "cls":
        start = _start(cache, entry)
        return None if start is None else (to_stored(start, recipe.stored), None)
    pooled = pool_residues(values, recipe.pooling)
    if source.stored != "fp32" and not pooled.all():
        return None  # small numbers of either sign were rounded to zeros, and the greatest one's sign is lost
    return to_stored(pooled, recipe.stored), None


def _start(cache: EmbeddingCache, entry: Entry) -> NDArray[np.float32] | None:
    try:
        start = cache.read_start(entry)
    except StorageError:
        return None
    return None if start is None else to_fp32(start, entry.stored)
