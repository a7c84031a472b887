"""A segment on its way into a cache: written an entry at a time, then made visible by its index."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.embeddings import segment as segment_file
from proteus_pipeline.embeddings.index import INDEXES, RECORD, Attestation, SegmentHeader, encode_index
from proteus_pipeline.embeddings.keys import key_array
from proteus_pipeline.embeddings.segment import Placed, SegmentWriter
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES, content_hash
from proteus_pipeline.errors import StorageError
from proteus_pipeline.stores.files import storage_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.recipe import Recipe
    from proteus_pipeline.stores.store import Store

SEGMENTS = "seg"


class Publication:
    """One segment, of entries by the same weights and recipe.

    What is added goes to a file at once, so that memory holds no more than one entry; nobody sees the file before
    `publish`, and a crash leaves nothing but it.

    Parameters
    ----------
    store
        The cache's.
    trunk, recipe
        What the entries' keys were made from.
    published
        The time in its name, nanoseconds since 1970, by which an invalidation knows what came before it; now where None.
    then
        Told what was published: what holds for the segment, its keys and records.

    Raises
    ------
    StorageError
        When the file can't be begun.

    """

    def __init__(
        self,
        store: Store,
        trunk: str,
        recipe: Recipe,
        published: int | None = None,
        then: Callable[[SegmentHeader, NDArray[np.void], NDArray[np.void]], None] | None = None,
    ) -> None:
        self._store = store
        self._then = then
        self._trunk = trunk
        self._recipe = recipe
        self._layout = "per_residue" if recipe.pooling == "per_residue" else "pooled"
        self.name = f"{time.time_ns() if published is None else published:020d}-{secrets.token_hex(6)}"
        self._file = store.begin(f"{SEGMENTS}/{self.name}.zip")
        self._width = 0
        self._have: set[str] = set()
        self._error: StorageError | None = None
        try:
            self._writer = SegmentWriter(self._file.path, recipe.stored, self._layout)
        except OSError as error:
            raise self._failed(error) from error

    def __len__(self) -> int:
        """Return the entries so far."""
        return len(self._have)

    def add(self, key: str, array: NDArray[np.generic], length: int, start: NDArray[np.generic] | None = None) -> str:
        """Write an entry, and return its content hash; a key that is there already is passed over.

        Parameters
        ----------
        key
            Its embedding key.
        array
            In the recipe's stored dtype, (L, D) or (D,).
        length
            Residues of its sequence.
        start
            (D,): per residue, the start token's vector, from which ``cls`` is derived.

        Raises
        ------
        StorageError
            When it can't be written.
        ValueError
            When the array is not what the recipe makes of so many residues.

        """
        if self._error:
            raise self._error  # what was written so far is gone with the file
        self._width = self._width or array.shape[-1]
        check_entry(self._recipe, key, array, length, self._width)
        content = content_hash(array, self._recipe.stored)
        if key not in self._have:
            try:
                self._writer.add(key, array, length, content, start)
            except OSError as error:
                raise self._failed(error) from error
            self._have.add(key)
        return content

    def publish(self, attestation: Attestation, **more: Any) -> SegmentHeader:
        """Make the entries visible: when this returns they are on the disk, and survive a crash.

        Parameters
        ----------
        attestation
            How they came to be.
        more
            Further attributes for the segment.

        Raises
        ------
        StorageError
            When they can't be; the cache is then as before.
        ValueError
            When there is no entry.

        """
        if self._error:
            raise self._error
        if not self._have:
            raise ValueError("no entries make no segment")
        described = self._recipe.described()
        attributes = {"format": segment_file.FORMAT, "trunk": self._trunk, "recipe": described}
        attributes |= {"stored": self._recipe.stored, "attestation": asdict(attestation)} | more
        try:
            placed, starts = self._writer.finish(self._width, {"proteus": attributes})
        except OSError as error:
            raise self._failed(error) from error
        starts = starts if self._layout == "per_residue" else []
        header = SegmentHeader(
            f"{self.name}.zip", self._writer.nbytes, self._layout, self._recipe.stored, self._width, self._trunk,
            described, attestation, len(placed), tuple(starts), self._writer.digest,
        )  # fmt: skip
        records = to_records(placed, self._writer.lengths, self._writer.contents)
        self._file.publish()
        keys = key_array(self._writer.keys)
        try:
            self._store.write(f"{INDEXES}/{self.name}.idx", encode_index([header], keys, records))
        except StorageError:
            with suppress(StorageError):
                self._store.remove(f"{SEGMENTS}/{header.segment}")
            raise
        if self._then:
            self._then(header, keys, records)
        return header

    def discard(self) -> None:
        """Forget it; does nothing after `publish`."""
        with suppress(AttributeError):  # not even begun
            self._writer.discard()
        self._file.discard()

    def _failed(self, error: OSError) -> StorageError:
        self.discard()
        self._error = storage_error("write", Path(self._store.location, SEGMENTS, f"{self.name}.zip"), error)
        return self._error


def check_entry(recipe: Recipe, key: str, array: NDArray[np.generic], length: int, width: int) -> None:
    """Make sure that an array is what a recipe makes of a sequence.

    Raises
    ------
    ValueError
        When it is not.

    """
    shape = (length, width) if recipe.pooling == "per_residue" else (width,)
    if array.dtype != NUMPY_DTYPES[recipe.stored] or array.shape != shape:
        shown = f"{array.dtype} {array.shape}"
        raise ValueError(f"{shown} is no {recipe.pooling} array of {length} residues in {recipe.stored} ({key})")


def check_entries(
    recipe: Recipe, keys: Sequence[str], arrays: Sequence[NDArray[np.generic]], lengths: Sequence[int]
) -> None:
    """Make sure that keys, arrays and lengths make one segment.

    Raises
    ------
    ValueError
        When they do not fit each other or the recipe.

    """
    if not keys or not len(keys) == len(arrays) == len(lengths):
        raise ValueError(f"{len(keys)} keys, {len(arrays)} arrays and {len(lengths)} lengths make no segment")
    if len(set(keys)) != len(keys):
        raise ValueError("a segment holds each key once")
    for key, array, length in zip(keys, arrays, lengths, strict=True):
        check_entry(recipe, key, array, length, arrays[0].shape[-1])


def to_records(placed: Sequence[Placed], lengths: Sequence[int], contents: Sequence[str]) -> NDArray[np.void]:
    """Return what the index of one segment says of each entry, in the order given."""
    records = np.zeros(len(placed), dtype=RECORD)
    for column in ("offset", "nbytes", "row"):
        records[column] = [getattr(p, column) for p in placed]
    records["length"] = lengths
    records["content"] = np.frombuffer(bytes.fromhex("".join(contents)), dtype="V16")
    return records
